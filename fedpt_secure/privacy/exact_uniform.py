"""A uniform real number of which only so many bits are drawn as a decision needs, compared exactly with exp(-a / b).

Fast samplers decide nearly everything from some 50 bits of a uniform number and a floating-point exponential. What is
left over, the few draws too close to the threshold for either, comes here: more bits are drawn, and the exponential is
bounded from both sides by decimal arithmetic, until the comparison is certain. `decimal`'s `exp` is correctly rounded,
so both bounds are rigorous.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Words = Callable[[int], npt.NDArray[np.uint64]]
"""`words(n)` returns n fresh, uniform, unpredictable 64-bit words."""

_WORD_BITS = 64
_GUARD_BITS = 64
_DIGITS_PER_BIT = 0.302


class LazyUniform:
    """A number uniform on [0, 1), known so far to lie in [prefix, prefix + 1) / 2^bits.

    Comparisons with several thresholds are about one and the same number: what one has drawn, the next one knows.
    """

    def __init__(self, prefix: int, bits: int, words: Words) -> None:
        """Take over the bits that are known; `words` gives the next ones, the more significant first."""
        self._prefix, self._bits, self._words = prefix, bits, words

    def below_exp(self, numerator: int, denominator: int) -> bool:
        """Whether it is below exp(-numerator / denominator), for a numerator of at least 0 and a positive denominator.

        Ends with probability 1: each further word leaves it undecided with a chance below 2^-63.
        """
        while True:
            scale = self._bits + _GUARD_BITS
            least, most = _scaled_exp(numerator, denominator, scale)
            if (self._prefix + 1) << _GUARD_BITS <= least:
                return True
            if self._prefix << _GUARD_BITS >= most:
                return False
            self._prefix = self._prefix << _WORD_BITS | int(self._words(1)[0])
            self._bits += _WORD_BITS

    def thresholds_above(self, numerator: int, denominator: int, *, known: int) -> int:
        """How many k of 1, 2, 3, ... have exp(-k numerator / denominator) above it, where the first `known` ones do."""
        count = known
        while self.below_exp((count + 1) * numerator, denominator):
            count += 1
        return count


def _scaled_exp(numerator: int, denominator: int, bits: int) -> tuple[int, int]:
    """Integers around 2^bits exp(-numerator / denominator), at most 3 apart."""
    digits = int(bits * _DIGITS_PER_BIT) + 25
    down = decimal.Context(prec=digits, rounding=decimal.ROUND_FLOOR, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    up = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    value, by = decimal.Decimal(numerator), decimal.Decimal(denominator)
    scale = decimal.Decimal(1 << bits)
    # The next number beyond a correctly rounded one bounds what was rounded.
    least = down.multiply(down.next_minus(down.exp(up.divide(value, by).copy_negate())), scale)
    most = up.multiply(up.next_plus(up.exp(down.divide(value, by).copy_negate())), scale)
    return max(0, int(down.to_integral_value(least))), int(up.to_integral_value(most))
