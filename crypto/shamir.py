"""Shamir's secret sharing (1979) of 32-byte secrets over a prime field just above 2^256.

Guarantees: fewer than `threshold` shares say nothing about the secret (information-theoretic, given fresh
uniform coefficients). `threshold` true shares give it back. Shares carry no check of their own: a false share
gives a false secret, so whoever reconstructs must compare the result with something public (a public key, a
commitment).

Python's integers do not run in constant time. Sharing happens on the client's own machine; reconstruction is
of secrets that its caller is entitled to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Final

from fedpt_secure.crypto.errors import InvalidShare, ParameterError
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33

_STEPS: Final = 8


def split(
    secret: bytes | bytearray,
    *,
    points: Sequence[int],
    threshold: int,
    random_bytes: RandomBytes = SYSTEM_RANDOM,
) -> list[bytearray]:
    """Shares of `secret` at distinct points in 1..2^32-1, in the order of `points`.

    Any `threshold` of them give it back; fewer say nothing about it.
    """
    if len(secret) != SECRET_BYTES:
        raise ParameterError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(points):
        raise ParameterError(f"a threshold of {threshold} is impossible with {len(points)} shares")
    _check_points(points)
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [_random_element(random_bytes) for _ in range(threshold - 1)]
    coefficients.reverse()
    # Points are small: a few of Horner's steps make a value of little more than 257 bits before it is reduced.
    steps = [coefficients[start : start + _STEPS] for start in range(0, threshold, _STEPS)]
    shares = []
    for point in points:
        value = 0
        for few in steps:
            for coefficient in few:
                value = value * point + coefficient
            value %= PRIME
        shares.append(bytearray(value.to_bytes(SHARE_BYTES, "big")))
    return shares


def reconstruct(shares: Mapping[int, bytes | bytearray], *, threshold: int) -> bytearray:
    """The secret behind `threshold` of the shares (point -> share); those with the lowest points are used.

    Raises:
        ParameterError: there are fewer shares than the threshold.
        InvalidShare: a share encodes no field element, or the result is no 32-byte secret. A false share may also
            go unnoticed here: compare the result with what its owner committed to.
    """
    if not 1 <= threshold <= len(shares):
        raise ParameterError(f"{len(shares)} shares are fewer than the threshold of {threshold}")
    points = tuple(sorted(shares)[:threshold])
    _check_points(points)
    value = 0
    for point, weight in zip(points, _lagrange_at_zero(points), strict=True):
        value += weight * decode_share(shares[point])
    value %= PRIME
    if value >> (8 * SECRET_BYTES):
        raise InvalidShare("the shares give no 32-byte secret")
    return bytearray(value.to_bytes(SECRET_BYTES, "big"))


def decode_share(share: bytes | bytearray) -> int:
    """The field element that a share encodes.

    Raises:
        InvalidShare: the bytes are not the canonical encoding of one.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise InvalidShare("bytes encode no element of the field")
    return value


def _check_points(points: Iterable[int]) -> None:
    seen = set()
    for point in points:
        # A share at zero is the secret itself; a repeated point makes the interpolation divide by zero.
        if not 1 <= point < 2**32 or point in seen:
            raise ParameterError(f"share points must be distinct and in 1..2^32-1; {point} is not")
        seen.add(point)


def _random_element(random_bytes: RandomBytes) -> int:
    # Reducing 48 bytes leaves a bias below 2^-127 on an element of 257 bits.
    return int.from_bytes(random_bytes(48), "big") % PRIME


@lru_cache(maxsize=64)
def _lagrange_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Weights w with f(0) = sum w_i f(x_i) for every polynomial of degree below len(points).

    Cached: a round rebuilds many secrets from shares of the same holders. Points are public.
    """
    product = prod(points) % PRIME
    # Points are small: their differences are multiplied out before anything is reduced. And of all that has to be
    # inverted only the product is (Montgomery's trick), since an inversion costs as much as hundreds of products.
    denominators = [own * prod(other - own for other in points if other != own) % PRIME for own in points]
    below = [1, *accumulate(denominators, lambda left, right: left * right % PRIME)]
    inverse = pow(below.pop(), -1, PRIME)
    weights = []
    for before, denominator in zip(reversed(below), reversed(denominators), strict=True):
        weights.append(product * before * inverse % PRIME)
        inverse = inverse * denominator % PRIME
    return tuple(reversed(weights))
