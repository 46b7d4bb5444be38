"""What an auditor plants: independent fair coins, dealt evenly, kept apart from the clients' own records."""

from __future__ import annotations

import secrets

import pytest
from scipy.stats import binom

from fedpt_secure.data import ClientText, FederatedText, Record
from fedpt_secure.data.planting import (
    REPETITIONS,
    SECRET_DIGITS,
    Canary,
    Planted,
    by_client,
    make_canaries,
    make_secrets,
    plant,
)
from fedpt_secure.errors import DataError

WORDS = [f"word{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(300)]
OWNERS = ("ann", "bob", "cy")


@pytest.fixture
def text():
    return FederatedText.of(
        "t", "d", (ClientText(name, (Record(f"{name} says"),), (Record(f"{name} kept"),)) for name in OWNERS)
    )


def test_canaries_are_distinct_dealt_evenly_and_their_coins_are_fair():
    """Not seeded: 2,000 coins outside their two-sided 1 - 1e-9 interval would be a false alarm."""
    canaries = make_canaries(2000, OWNERS, WORDS, below=secrets.randbelow)
    assert len({canary.text for canary in canaries}) == 2000
    assert sorted(len(mine) for mine in by_client(Planted(canaries)).values()) == [666, 667, 667]
    low, high = binom.interval(1 - 1e-9, 2000, 0.5)
    assert low <= sum(canary.included for canary in canaries) <= high


def test_only_included_canaries_are_trained_on_and_none_is_held_out(text):
    canaries = make_canaries(60, OWNERS, WORDS, below=secrets.randbelow)
    changed = plant(text, Planted(canaries))
    for client in changed.clients:
        mine = {canary.text for canary in canaries if canary.client_id == client.client_id and canary.included}
        assert {record.text for record in client.train[1:]} == mine
        assert client.held_out == text.client(client.client_id).held_out
    assert changed.digest != text.digest


def test_secrets_stand_as_often_as_they_say(text):
    pytest.importorskip("faker")
    made = make_secrets(2, OWNERS, below=secrets.randbelow, seed=1)
    assert [item.copies for item in made] == [copies for copies in REPETITIONS for _ in range(2)]
    changed = plant(text, Planted(secrets=made))
    everything = [record.text for client in changed.clients for record in client.train]
    for item in made:
        assert everything.count(item.text) == item.copies
        assert len(item.number) == SECRET_DIGITS
        assert item.number.isdigit()


def test_a_canary_that_is_somebodys_own_record_is_refused(text):
    with pytest.raises(DataError, match="already among"):
        plant(text, Planted((Canary("ann", "bob says", included=False),)))


def test_a_canary_for_nobody_is_refused(text):
    with pytest.raises(DataError, match="no client"):
        plant(text, Planted((Canary("dan", "hello", included=True),)))


def test_too_few_words_are_refused():
    with pytest.raises(DataError, match="too few"):
        make_canaries(3, OWNERS, ["a", "b"], below=secrets.randbelow)
