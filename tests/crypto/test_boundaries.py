"""Every limit is reached by something that is accepted, and passed by something that is not."""

import msgspec
import numpy as np
import pytest

from fedpt_secure.crypto import (
    EncodingError,
    FixedPointEncoding,
    Identity,
    InvalidShare,
    MalformedMessage,
    ParameterError,
    Roster,
    identities,
    ring_dtype,
    secure_aggregation_parameters,
)
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.identities import check_client_id
from fedpt_secure.crypto.parameters import graph_withstands, sparsest_graph
from fedpt_secure.crypto.shamir import PRIME, decode_share, reconstruct, split


@pytest.mark.parametrize("accepted", ["a", "x" * 128, "\u00e9" * 64])
def test_an_id_has_1_to_128_bytes(accepted):
    check_client_id(accepted)
    for refused in ("", "x" * 129, "\u00e9" * 64 + "x"):
        with pytest.raises(ParameterError):
            check_client_id(refused)


def test_a_seed_has_32_bytes():
    Identity(bytes(32))
    for size in (0, 31, 33):
        with pytest.raises(ParameterError, match="32-byte seed"):
            Identity(bytes(size))


def test_a_roster_has_a_largest_size_and_so_has_its_file(monkeypatch):
    keys = {f"client-{number}": Identity(bytes([number]) * 32).verify_key_bytes for number in range(4)}
    three = {name: keys[name] for name in list(keys)[:3]}
    monkeypatch.setattr(identities, "LARGEST_ROSTER", 3)
    assert len(Roster(three)) == 3
    assert len(Roster({"client-0": keys["client-0"]})) == 1
    with pytest.raises(ParameterError, match="1 to 3 clients, not 4"):
        Roster(keys)
    content = Roster(three).to_json()
    monkeypatch.setattr(identities, "_LARGEST_ROSTER_FILE", len(content))
    assert Roster.from_json(content) == Roster(three)
    monkeypatch.setattr(identities, "_LARGEST_ROSTER_FILE", len(content) - 1)
    with pytest.raises(ParameterError, match="at most"):
        Roster.from_json(content)


def test_part_of_a_roster_digest_is_no_digest_and_is_told_apart_from_a_wrong_one():
    """Somebody who read half of it over the telephone must not be told that the roster is another one."""
    rosters = (Roster({"alice": Identity(bytes([number]) * 32).verify_key_bytes}) for number in range(100))
    roster = next(roster for roster in rosters if len(set(roster.digest.hex())) == 16)
    whole = roster.digest.hex()
    roster.check_digest(f" {whole[:10]} {whole[10:]}".upper())
    for part in (whole[:-1], whole + "0", "g" + whole[1:], ""):
        with pytest.raises(ParameterError, match="64 hexadecimal digits"):
            roster.check_digest(part)
    with pytest.raises(ParameterError, match="the roster's digest is"):
        roster.check_digest("0" * 64)


def test_an_id_that_stands_in_a_roster_file_twice_is_called_that():
    content = Roster({"alice": Identity(bytes(32)).verify_key_bytes}).to_json()
    file = msgspec.json.decode(content)
    file["clients"] *= 2
    with pytest.raises(ParameterError, match="appears twice"):
        Roster.from_json(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")


def test_the_clients_of_a_roster_file_are_sorted():
    """Two files of one roster would have two digests of their own, for whoever hashes files."""
    keys = {name: Identity(name.encode().ljust(32)).verify_key_bytes for name in ("alice", "bob")}
    file = msgspec.json.decode(Roster(keys).to_json())
    file["clients"].reverse()
    with pytest.raises(ParameterError, match="not sorted"):
        Roster.from_json(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")


def test_share_points_reach_from_1_to_the_last_of_32_bits():
    points = (1, 2**32 - 1)
    shares = dict(zip(points, split(b"s" * 32, points=points, threshold=2), strict=True))
    assert reconstruct(shares, threshold=2) == b"s" * 32
    for outside in (0, 2**32, -1):
        with pytest.raises(ParameterError, match="share points"):
            split(b"s" * 32, points=(1, outside), threshold=1)


def test_a_threshold_reaches_from_1_to_all():
    for threshold in (1, 2):
        assert len(split(b"s" * 32, points=(1, 2), threshold=threshold)) == 2
    for threshold in (0, 3):
        with pytest.raises(ParameterError):
            split(b"s" * 32, points=(1, 2), threshold=threshold)
    shares = dict(zip((1, 2), split(b"s" * 32, points=(1, 2), threshold=1), strict=True))
    assert reconstruct(shares, threshold=1) == b"s" * 32
    for threshold in (0, 3):
        with pytest.raises(ParameterError):
            reconstruct(shares, threshold=threshold)


def test_a_share_is_below_the_prime():
    assert decode_share((PRIME - 1).to_bytes(33, "big")) == PRIME - 1
    assert decode_share(bytes(33)) == 0
    for refused in (PRIME.to_bytes(33, "big"), bytes(32), bytes(34)):
        with pytest.raises(InvalidShare):
            decode_share(refused)


def test_a_message_may_be_as_long_as_its_fields_can_make_it(make_cohort):
    """512 bytes of frame, one bitmap, and the body that the phase allows; not one byte more is parsed."""
    context = make_cohort(9).context()
    limit = 100 + 2 + 512
    with pytest.raises(MalformedMessage, match="not a Survivors"):
        m.decode(b"\xc1" * limit, m.Survivors, context, body_bytes=100)
    with pytest.raises(MalformedMessage, match=f"at most {limit} bytes; this is {limit + 1} bytes long"):
        m.decode(b"\xc1" * (limit + 1), m.Survivors, context, body_bytes=100)


def test_the_first_and_the_last_client_may_send(make_cohort):
    context = make_cohort(5).context()
    for sender in (0, 4):
        message = m.Confirmation(session=context.session_digest, sender=sender, signature=bytes(64))
        assert m.decode(m.encode(message), m.Confirmation, context).sender == sender
    for sender in (-1, 5):
        message = m.Confirmation(session=context.session_digest, sender=sender, signature=bytes(64))
        with pytest.raises(MalformedMessage, match="position in the cohort of 5"):
            m.decode(m.encode(message), m.Confirmation, context)


def test_the_frame_allowance_covers_every_message(make_cohort):
    """What is allowed beside the body is more than the fixed fields of any kind of message need."""
    context = make_cohort(9).context()
    fixed = {"sender": 8, "session": context.session_digest, "signature": bytes(64)}
    for kind in (m.Advertisement, m.SealedShares, m.MaskedVector, m.Confirmations, m.Unmasking):
        names = [field.name for field in msgspec.structs.fields(kind)]
        message = kind(**{name: fixed.get(name, bytes(32)) for name in names})
        assert len(m.encode(message)) <= 512
        m.decode(m.encode(message), kind, context)


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.uint32), (32, np.uint32), (33, np.uint64), (64, np.uint64)])
def test_rings_reach_from_16_to_64_bits(bits, dtype):
    assert ring_dtype(bits) == dtype
    for refused in (15, 65):
        with pytest.raises(ParameterError):
            ring_dtype(refused)


def test_a_sum_may_reach_what_its_clients_can_reach_and_no_step_more():
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=10)
    for survivors in (1, 10):
        limit = survivors * encoding.level
        for sign in (1, -1):
            total = np.array([sign * limit % 2**32], dtype=np.uint32)
            assert encoding.decode_sum(total, survivors=survivors) == pytest.approx([sign * survivors])
            beyond = np.array([sign * (limit + 1) % 2**32], dtype=np.uint32)
            with pytest.raises(EncodingError):
                encoding.decode_sum(beyond, survivors=survivors)
    for survivors in (0, 11):
        with pytest.raises(EncodingError):
            encoding.decode_sum(np.zeros(1, dtype=np.uint32), survivors=survivors)


def test_a_cohort_may_be_as_large_as_one_level_each_allows():
    assert FixedPointEncoding(ring_bits=16, bound=1.0, cohort=2**15 - 1).level == 1
    assert FixedPointEncoding(ring_bits=16, bound=1.0, cohort=1).level == 2**15 - 1
    for cohort in (0, 2**15):
        with pytest.raises(ParameterError):
            FixedPointEncoding(ring_bits=16, bound=1.0, cohort=cohort)


def test_cohorts_of_parameters_reach_from_2_to_the_largest_roster():
    assert secure_aggregation_parameters(2, 0.0, 0.0).threshold == 2
    assert secure_aggregation_parameters(1 << 16, 0.0, 0.0).degree is not None
    for refused in (1, (1 << 16) + 1, 100.0, "100", True):
        with pytest.raises(ParameterError, match="a cohort of"):
            secure_aggregation_parameters(refused, 0.0, 0.0)


@pytest.mark.parametrize("name", ["security_bits", "correctness_bits", "grinding_bits"])
def test_bits_reach_from_0_to_512(name):
    for bits in (0, 512):
        secure_aggregation_parameters(100, 0.01, 0.01, **{name: bits})
    for refused in (-1, 513, 40.5, "40", None):
        with pytest.raises(ParameterError, match=name):
            secure_aggregation_parameters(100, 0.01, 0.01, **{name: refused})


@pytest.mark.parametrize("refused", [-0.01, 1.0, float("nan"), float("inf")])
def test_fractions_reach_from_0_to_below_1(refused):
    secure_aggregation_parameters(100, 0.0, 0.0)
    with pytest.raises(ParameterError, match="corrupt_fraction"):
        secure_aggregation_parameters(100, refused, 0.0)
    with pytest.raises(ParameterError, match="dropout_fraction"):
        secure_aggregation_parameters(100, 0.0, refused)


def test_a_majority_may_be_all_that_the_dropouts_leave():
    """Ten clients, two corrupt, three lost: seven must agree, and seven are left."""
    found = secure_aggregation_parameters(10, 0.2, 0.3)
    assert (found.threshold, found.minimum_survivors) == (7, 7)
    with pytest.raises(ParameterError, match="7 must agree, and only 6 may be left"):
        secure_aggregation_parameters(10, 0.2, 0.4)


def test_the_sparse_graph_starts_at_a_hundred_clients():
    assert secure_aggregation_parameters(99, 0.05, 0.05).degree is None
    assert secure_aggregation_parameters(100, 0.05, 0.05).degree is not None


def test_a_threshold_that_two_halves_of_the_holders_reach_withstands_nothing():
    settings = {"cohort": 50, "degree": 10, "corrupt": 0, "dropouts": 5, "security_bits": 0}
    assert not graph_withstands(threshold=5, **settings)
    assert not graph_withstands(threshold=5, **settings | {"dropouts": 0})
    assert graph_withstands(threshold=6, **settings)


def test_a_directory_that_the_server_can_make_complete_counts_all_its_accomplices():
    """Twelve clients, degree 8: with four left out, everybody left holds everybody's shares, accomplices included."""
    settings = {"cohort": 12, "degree": 8, "dropouts": 4, "security_bits": 0}
    assert graph_withstands(threshold=8, corrupt=5, **settings)
    assert not graph_withstands(threshold=8, corrupt=7, **settings)


def test_no_graph_is_found_where_none_can_be():
    assert sparsest_graph(100, 85, 10, security_bits=40, correctness_bits=20) is None
    assert sparsest_graph(4, 0, 1, security_bits=1, correctness_bits=1) is None
