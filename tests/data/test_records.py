"""The federation object: sorted, checked, and identified by its content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.data import ClientText, FederatedText, Preparation, Record
from fedpt_secure.data.records import content_digest
from fedpt_secure.errors import DataError


def client(name, train=("a",), held_out=("b",)):
    return ClientText(name, tuple(map(Record, train)), tuple(map(Record, held_out)))


def test_clients_are_sorted_and_found_by_id():
    text = FederatedText.of("t", "d", [client("b"), client("a")])
    assert text.client_ids == ("a", "b")
    assert text.client("b").client_id == "b"


def test_digest_does_not_depend_on_the_order_clients_are_given_in():
    one, two = client("a"), client("b")
    assert FederatedText.of("t", "d", [one, two]).digest == FederatedText.of("t", "d", [two, one]).digest


@pytest.mark.parametrize(
    "other",
    [
        [client("c")],
        [client("a", train=("b",), held_out=("a",))],
        [client("a", train=("a", "x"))],
        [ClientText("a", (Record("a", "p"),), (Record("b"),))],
        [client("a"), client("b")],
    ],
)
def test_digest_changes_with_any_change_of_content(other):
    assert content_digest([client("a")]) != content_digest(other)


texts = st.text(max_size=4)
clients = st.builds(
    lambda name, train, held_out: client(name, train, held_out),
    texts,
    st.lists(texts, max_size=3),
    st.lists(texts, max_size=3),
)


@given(st.lists(clients, max_size=3), st.lists(clients, max_size=3))
def test_digest_is_equal_only_for_equal_content(one, two):
    assert (content_digest(one) == content_digest(two)) == (one == two)


def test_unknown_client_is_refused_with_the_closest_names():
    text = FederatedText.of("t", "d", [client("alice"), client("bob")])
    with pytest.raises(DataError, match="unknown client 'alise'") as caught:
        text.client("alise")
    assert "alice" in caught.value.hint


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "no clients"),
        ([client("a"), client("a")], "'a' twice"),
        ([client("a", train=())], "0 training"),
        ([client("a", held_out=())], "0 held-out"),
    ],
)
def test_federation_that_cannot_be_used_is_refused(clients, message):
    with pytest.raises(DataError, match=message):
        FederatedText.of("t", "d", clients)


def test_preparation_says_everything_that_was_left_out():
    preparation = Preparation(1000, {"empty": 3}, 4, 2, 7)
    assert preparation.sentence() == (
        "1,000 records read; 3 left out (empty); 4 exact duplicates left out; "
        "2 clients with too few records left out (7 records)"
    )
    assert Preparation(5).sentence() == "5 records read"


def test_key_ignores_surrounding_white_space_only():
    assert Record(" a b\n", "p ").key == Record("a b", "p").key
    assert Record("a  b").key != Record("a b").key
    assert Record("A").key != Record("a").key
    assert Record("a", "p").key != Record("p", "a").key
