"""Second implementations, slow and obvious: what the fast ones are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

PRIME = 2**256 + 297


def pack_slowly(values: Sequence[int], bits: int) -> bytes:
    """One number whose binary digits are the values' one after the other, the first lowest; little-endian bytes."""
    digits = 0
    for place, value in enumerate(values):
        digits |= value << bits * place
    return digits.to_bytes((len(values) * bits + 7) // 8, "little")


def unpack_slowly(packed: bytes, length: int, bits: int) -> list[int] | None:
    """The values, or None where the bytes are too many, too few, or have a bit beyond the last value."""
    digits = int.from_bytes(packed, "little")
    if len(packed) != (length * bits + 7) // 8 or digits >> length * bits:
        return None
    return [digits >> bits * place & (1 << bits) - 1 for place in range(length)]


def interpolate_at_zero(shares: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial through the points, modulo `PRIME`: Lagrange's formula in rational numbers.

    Numerators and denominators are small enough to be kept as fractions and reduced once, at the end.
    """
    total = 0
    for own, value in shares.items():
        weight = Fraction(1)
        for other in shares:
            if other != own:
                weight *= Fraction(other, other - own)
        total += value * weight.numerator * pow(weight.denominator, PRIME - 2, PRIME)
    return total % PRIME
