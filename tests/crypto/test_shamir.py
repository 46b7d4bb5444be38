from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpt_secure.crypto import InsecureDeterministicBytes, InvalidShare, ParameterError
from fedpt_secure.crypto.shamir import PRIME, SHARE_BYTES, decode_share, reconstruct, split


def test_the_field_is_prime_and_holds_every_32_byte_secret():
    """Miller-Rabin with 40 bases: a composite passes with probability below 4^-40."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, PRIME)
        assert value in (1, PRIME - 1) or any(pow(base, odd * 2**power, PRIME) == PRIME - 1 for power in range(1, twos))
    assert PRIME > 2**256 - 1


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_many_shares_give_the_secret_back(secret, threshold, data):
    count = data.draw(st.integers(threshold, 14))
    points = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=count, max_size=count, unique=True))
    shares = dict(zip(points, split(secret, points=points, threshold=threshold), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, count))]
    assert reconstruct({point: shares[point] for point in chosen}, threshold=threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["smallest", "largest"])
def test_secrets_at_the_edge_of_the_range_survive_every_subset(secret):
    shares = dict(zip(range(1, 6), split(secret, points=range(1, 6), threshold=3), strict=True))
    for chosen in combinations(shares, 3):
        assert reconstruct({point: shares[point] for point in chosen}, threshold=3) == secret


def test_fewer_shares_than_the_threshold_are_refused():
    shares = dict(zip((1, 2, 3), split(bytes(32), points=(1, 2, 3), threshold=3), strict=True))
    del shares[2]
    with pytest.raises(ParameterError):
        reconstruct(shares, threshold=3)


def test_threshold_minus_one_shares_fit_every_secret():
    """Perfect secrecy, constructively: for any other secret there is a polynomial through the same t - 1 shares."""
    points, shares = (1, 2), split(b"\x01" * 32, points=(1, 2, 3), threshold=3)
    x1, x2 = points
    y1, y2 = decode_share(shares[0]), decode_share(shares[1])
    for other in (0, 12345, 2**256 - 1):
        # The quadratic with f(0) = other through both shares exists: solve for its two coefficients.
        determinant = x1 * x2 * x2 - x2 * x1 * x1
        inverse = pow(determinant, -1, PRIME)
        linear = ((y1 - other) * x2 * x2 - (y2 - other) * x1 * x1) * inverse % PRIME
        square = (x1 * (y2 - other) - x2 * (y1 - other)) * inverse % PRIME
        assert all((other + linear * x + square * x * x - y) % PRIME == 0 for x, y in ((x1, y1), (x2, y2)))


def test_single_shares_of_a_fixed_secret_are_uniform():
    """Chi-square on the low byte of 4,096 shares; false alarm 1e-6 (the generator is seeded)."""
    draw = InsecureDeterministicBytes(b"shamir uniformity")
    lows = [split(b"s" * 32, points=(1, 2), threshold=2, random_bytes=draw)[0][-1] for _ in range(4096)]
    counts = [lows.count(value) for value in range(256)]
    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_false_share_gives_another_secret_or_an_error():
    shares = dict(zip((1, 2, 3), split(b"s" * 32, points=(1, 2, 3), threshold=2), strict=True))
    shares[1][-1] ^= 1
    with suppress(InvalidShare):
        assert reconstruct(shares, threshold=2) != b"s" * 32


@pytest.mark.parametrize("share", [b"", bytes(SHARE_BYTES - 1), b"\xff" * SHARE_BYTES, PRIME.to_bytes(33, "big")])
def test_bytes_outside_the_field_are_no_share(share):
    with pytest.raises(InvalidShare):
        decode_share(share)
    with pytest.raises(InvalidShare):
        reconstruct({1: share, 2: bytes(SHARE_BYTES)}, threshold=2)


def test_shares_of_a_number_beyond_32_bytes_give_no_secret():
    with pytest.raises(InvalidShare, match="no 32-byte secret"):
        reconstruct({1: (2**256 + 5).to_bytes(SHARE_BYTES, "big")}, threshold=1)


def test_a_share_at_zero_is_not_taken_for_one():
    with pytest.raises(ParameterError):
        reconstruct({0: bytes(SHARE_BYTES), 1: bytes(SHARE_BYTES)}, threshold=2)


@pytest.mark.parametrize("points", [(0, 1), (1, 1), (-1, 2), (1, 2**32)])
def test_points_that_would_give_the_secret_away_or_repeat_are_refused(points):
    with pytest.raises(ParameterError):
        split(bytes(32), points=points, threshold=2)


@pytest.mark.parametrize(("threshold", "secret"), [(0, bytes(32)), (3, bytes(32)), (2, bytes(31))])
def test_impossible_sharings_are_refused(threshold, secret):
    with pytest.raises(ParameterError):
        split(secret, points=(1, 2), threshold=threshold)
