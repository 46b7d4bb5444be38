from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto.labels import Label, derive_key, digest

PARTS = st.lists(st.binary(max_size=12), max_size=4)


def test_labels_are_distinct_and_carry_the_protocol_version():
    values = [label.value for label in Label]
    assert len(set(values)) == len(values)
    assert all(value.startswith("fedpt-secagg/1 ") for value in values)


@settings(deadline=None, max_examples=200)
@given(PARTS, PARTS)
def test_different_parts_have_different_digests(one, other):
    assert (digest(Label.SESSION, one) == digest(Label.SESSION, other)) == (one == other)


def test_moving_a_byte_between_parts_changes_the_digest():
    """Plain concatenation, the usual mistake, would give the same hash input for both."""
    assert digest(Label.SESSION, (b"ab", b"c")) != digest(Label.SESSION, (b"a", b"bc"))


def test_the_same_secret_gives_unrelated_keys_for_different_purposes():
    keys = {derive_key(b"s" * 32, salt=b"t" * 32, label=label, parts=(b"x",)) for label in Label}
    assert len(keys) == len(Label)


def test_the_documented_table_is_the_one_in_the_code():
    """Every row, in order: a second implementation is written from the page."""
    page = Path(__file__).parents[2] / "docs" / "protocol.md"
    rows = [line.split("`") for line in page.read_text().splitlines() if line.count("`fedpt-secagg/1 ") == 1]
    assert [(row[1], row[3]) for row in rows] == [(label.name, label.value) for label in Label]
