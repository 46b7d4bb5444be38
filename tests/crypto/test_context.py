from dataclasses import fields, replace

import msgspec
import pytest

from fedpt_secure.crypto import MalformedMessage, ParameterError, RoundContext, UnknownSender, default_threshold

GOOD = {
    "run_id": b"r" * 16,
    "round_index": 3,
    "attempt": 1,
    "cohort": ("c", "a", "b", "d", "e"),
    "roster_digest": b"R" * 32,
    "model_digest": b"M" * 32,
    "vector_length": 10,
    "ring_bits": 32,
    "threshold": 4,
    "minimum_survivors": 3,
    "degree": None,
}


def test_default_threshold_is_floor_of_two_thirds_plus_one_and_beats_split_views():
    assert [default_threshold(n) for n in (2, 3, 4, 10, 64, 100)] == [2, 3, 3, 7, 43, 67]
    assert all(2 * default_threshold(n) > n + (n - 1) // 3 for n in range(2, 500))


def test_a_context_survives_its_bytes_and_sorts_its_cohort():
    context = RoundContext(**GOOD)
    assert RoundContext.from_bytes(context.to_bytes()) == context
    assert context.cohort == ("a", "b", "c", "d", "e")
    assert context.session_digest == RoundContext(**GOOD | {"cohort": tuple("abcde")}).session_digest


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": b"s" * 16},
        {"round_index": 4},
        {"attempt": 2},
        {"cohort": tuple("abcdf")},
        {"roster_digest": b"S" * 32},
        {"model_digest": b"N" * 32},
        {"vector_length": 11},
        {"ring_bits": 31},
        {"threshold": 5},
        {"minimum_survivors": 4},
        {"degree": 2, "threshold": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_session_digest_covers_every_field(change):
    base = RoundContext(**GOOD)
    assert replace_context(base, change).session_digest != base.session_digest


def test_no_field_escapes_the_test_above():
    covered = set(GOOD) | {"session_digest"}
    assert {field.name for field in fields(RoundContext)} == covered


def replace_context(context, change):
    values = {name: getattr(context, name) for name in GOOD}
    return RoundContext(**values | change)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": b"short"},
        {"run_id": "r" * 16},
        {"model_digest": b""},
        {"roster_digest": bytes(31)},
        {"cohort": ("a",), "threshold": 2, "minimum_survivors": 2},
        {"cohort": ("a", "a", "b", "c", "d")},
        {"cohort": ("a", "b", "c", "d", "\n")},
        {"round_index": -1},
        {"attempt": 2**33},
        {"vector_length": 0},
        {"ring_bits": 15},
        {"ring_bits": 65},
        {"threshold": 1},
        {"threshold": 6},
        {"minimum_survivors": 1},
        {"minimum_survivors": 6},
        {"degree": "2"},
        {"degree": 2.0},
        {"degree": 3},
        {"degree": 0},
        {"degree": 4},
        {"degree": 2, "threshold": 3, "minimum_survivors": 2},
    ],
    ids=str,
)
def test_a_context_that_makes_no_sense_is_refused(change):
    with pytest.raises(ParameterError):
        RoundContext(**GOOD | change)


def test_all_problems_are_reported_together():
    with pytest.raises(ParameterError) as caught:
        RoundContext(**GOOD | {"ring_bits": 8, "threshold": 1, "run_id": b""})
    assert all(name in caught.value.message for name in ("ring_bits", "threshold", "run_id"))


def test_bytes_that_are_not_canonical_are_refused():
    encoded = RoundContext(**GOOD).to_bytes()
    values = msgspec.msgpack.decode(encoded)
    unsorted = values.copy()
    unsorted[5] = values[5][::-1]
    other_suite = [values[0], "ROT13", *values[2:]]
    other_version = [2, *values[1:]]
    for bad in (b"", encoded[:-1], encoded + b"\0", b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(MalformedMessage):
            RoundContext.from_bytes(bad)
    for bad_values in (unsorted, other_suite, other_version, [*values, 1], values[:-1]):
        with pytest.raises(MalformedMessage):
            RoundContext.from_bytes(msgspec.msgpack.encode(bad_values))


def test_another_version_or_suite_is_named_as_such():
    values = msgspec.msgpack.decode(RoundContext(**GOOD).to_bytes())
    for other in ([2, *values[1:]], [values[0], "ROT13", *values[2:]]):
        with pytest.raises(MalformedMessage, match="this side speaks version 1"):
            RoundContext.from_bytes(msgspec.msgpack.encode(other))


def test_a_context_beyond_any_roster_is_refused_before_it_is_parsed():
    with pytest.raises(MalformedMessage, match="at most"):
        RoundContext.from_bytes(bytes(17 << 20))


@pytest.mark.parametrize("wrong", [None, "text", 3, bytearray(b"x")])
def test_a_context_is_read_from_bytes_only(wrong):
    with pytest.raises(MalformedMessage, match="is read from bytes"):
        RoundContext.from_bytes(wrong)


def _context_of(size):
    names = tuple(f"{number:05d}" for number in range(size))
    return RoundContext(**GOOD | {"cohort": names, "threshold": 2, "minimum_survivors": 2})


def test_a_cohort_has_two_clients_to_as_many_as_a_roster_can_hold():
    assert len(_context_of(2).cohort) == 2
    assert len(_context_of(1 << 16).cohort) == 1 << 16
    with pytest.raises(ParameterError, match="the cohort has 65537"):
        _context_of((1 << 16) + 1)
    with pytest.raises(ParameterError, match="the cohort has 1 clients"):
        RoundContext(**GOOD | {"cohort": ("a",)})


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("round_index", 0, 2**32),
        ("attempt", 0, 2**32),
        ("vector_length", 1, 2**31),
        ("ring_bits", 16, 64),
        ("threshold", 2, 5),
        ("minimum_survivors", 2, 5),
    ],
)
def test_every_number_has_bounds_that_it_may_reach(name, least, most):
    for value in (least, most):
        assert getattr(RoundContext(**GOOD | {name: value}), name) == value
    for value in (least - 1, most + 1, 2.5, "3", None):
        with pytest.raises(ParameterError, match=name):
            RoundContext(**GOOD | {name: value})


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"degree": 2, "threshold": 3}, True),
        ({"degree": 3, "threshold": 3}, False),
        ({"degree": 4, "threshold": 3}, False),
        ({"degree": 2, "threshold": 4}, False),
        ({"cohort": tuple("abcdef"), "degree": 4, "threshold": 5, "minimum_survivors": 4}, True),
        ({"cohort": tuple("abcdef"), "degree": 4, "threshold": 5, "minimum_survivors": 3}, False),
    ],
    ids=str,
)
def test_a_sparse_graph_fits_its_cohort_threshold_and_quorum(change, accepted):
    if accepted:
        assert RoundContext(**GOOD | change).degree == change["degree"]
        return
    with pytest.raises(ParameterError):
        RoundContext(**GOOD | change)


def test_a_context_of_the_largest_size_is_parsed_and_one_byte_more_is_not():
    with pytest.raises(MalformedMessage, match="not a round context"):
        RoundContext.from_bytes(bytes(16 << 20))
    with pytest.raises(MalformedMessage, match="at most 16777216 bytes"):
        RoundContext.from_bytes(bytes((16 << 20) + 1))


def test_a_context_is_frozen():
    context = RoundContext(**GOOD)
    with pytest.raises(AttributeError):
        context.threshold = 2
    with pytest.raises((TypeError, ValueError)):
        replace(context, session_digest=bytes(32))


def test_positions_follow_the_sorted_cohort():
    context = RoundContext(**GOOD)
    assert [context.index_of(name) for name in "abcde"] == [0, 1, 2, 3, 4]
    for stranger in ("", "aa", "f"):
        with pytest.raises(UnknownSender):
            context.index_of(stranger)
