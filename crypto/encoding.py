"""Real vectors in and out of the ring Z_{2^b}: fixed point that provably cannot wrap, rounded without bias."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto.errors import EncodingError, ParameterError
from fedpt_secure.crypto.packing import ring_dtype
from fedpt_secure.crypto.prg import Keystream, RingVector
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes

_CHUNK_ELEMENTS: Final = 1 << 15
_LARGEST_LEVEL: Final = 1 << 52  # above it float64 has no fractional bits left to round


class FixedPointEncoding:
    """Coordinates in [-bound, bound] as integers in [-level, level], and sums of them back.

    Guarantees:
        No wrap: level = floor((2^(ring_bits - 1) - 1) / cohort), so the sum of at most `cohort` encoded
        vectors lies in (-2^(ring_bits - 1), 2^(ring_bits - 1)) and is read back as a signed integer without
        ambiguity. `level` is the largest integer with that property (capped at 2^52, the precision of
        float64).

        No bias: a coordinate between two integers is rounded up with the probability of its fractional part,
        from a cryptographic generator. The expectation of the encoded value is the clipped one, up to 2^-31 of
        a step; the error is below one step, 1 / scale, and its variance at most a quarter of a step squared.

    Attributes:
        ring_bits: b.
        bound: largest magnitude of a coordinate that is not clipped; public, the same for every client.
        cohort: most vectors that may be summed.
        level: the integer that `bound` becomes.
        scale: steps per unit, level / bound.

    Raises:
        ParameterError: the bound is not positive and finite, or the ring leaves less than one level to each
            client.
    """

    def __init__(self, *, ring_bits: int = 32, bound: float, cohort: int) -> None:
        self._dtype = ring_dtype(ring_bits)
        if not (np.isfinite(bound) and bound > 0):
            raise ParameterError(f"the bound is {bound}; it must be positive and finite")
        if cohort < 1:
            raise ParameterError(f"a cohort of {cohort} sums nothing")
        self.ring_bits = ring_bits
        self.bound = float(bound)
        self.cohort = cohort
        self.level = min((2 ** (ring_bits - 1) - 1) // cohort, _LARGEST_LEVEL)
        if self.level < 1:
            raise ParameterError(
                f"{cohort} vectors cannot be summed in a ring of {ring_bits} bits without wrapping",
                hint="a larger ring_bits or a smaller cohort",
            )
        self.scale = self.level / self.bound
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ParameterError(f"a bound of {bound} leaves no scale that float64 can hold")

    def __repr__(self) -> str:
        return f"FixedPointEncoding(ring_bits={self.ring_bits}, bound={self.bound}, cohort={self.cohort})"

    def encode(self, values: npt.NDArray[np.floating[Any]], *, random_bytes: RandomBytes = SYSTEM_RANDOM) -> RingVector:
        """The ring vector of a real one: clipped to the bound, scaled, rounded at random.

        Args:
            values: [d], float32 or float64, finite.
            random_bytes: source of the key that the rounding is expanded from.

        Returns:
            [d] of the ring's dtype.

        Raises:
            EncodingError: a value is not finite, or the array is not 1-D and floating.
        """
        _check_real(values)
        rounding = Keystream(random_bytes(32))
        encoded = np.empty(values.size, dtype=self._dtype)
        signed = encoded.view(np.dtype(f"i{self._dtype.itemsize}"))
        # Made once: to allocate them for every chunk costs as much as the arithmetic.
        most = min(values.size, _CHUNK_ELEMENTS)
        steps_buffer, lower_buffer = np.empty(most), np.empty(most)
        coins_buffer, odds_buffer = np.empty(most, dtype="<u4"), np.empty(most, dtype=np.uint32)
        for start in range(0, values.size, _CHUNK_ELEMENTS):
            chunk = values[start : start + _CHUNK_ELEMENTS]
            if not np.isfinite(chunk).all():
                raise EncodingError(
                    f"coordinate {start + int(np.argmin(np.isfinite(chunk)))} is not finite",
                    hint="the update diverged; it must not be sent",
                )
            size = chunk.size
            steps, lower, coins, odds = (
                buffer[:size] for buffer in (steps_buffer, lower_buffer, coins_buffer, odds_buffer)
            )
            np.copyto(steps, chunk)
            np.clip(steps, -self.bound, self.bound, out=steps)
            np.multiply(steps, self.scale, out=steps)
            np.floor(steps, out=lower)
            np.subtract(steps, lower, out=steps)
            # The fraction of a tiny negative number is 1.0 in float64: a factor of 2^32 would wrap its odds to zero.
            np.multiply(steps, 2.0**32 - 1, out=steps)
            np.copyto(odds, steps, casting="unsafe")
            rounding.fill(coins.data.cast("B"))
            np.add(lower, coins < odds, out=lower)
            # Only the last bit of the multiplication by the scale can pass the level; the bound on the sum
            # needs it exact.
            np.clip(lower, -self.level, self.level, out=lower)
            np.copyto(signed[start : start + size], lower, casting="unsafe")
        if self.ring_bits != self._dtype.itemsize * 8:
            encoded &= self._dtype.type((1 << self.ring_bits) - 1)
        return encoded

    def count_clipped(self, values: npt.NDArray[np.floating[Any]]) -> int:
        """How many coordinates `encode` would clip. Private to the client, as the values are.

        Raises:
            EncodingError: the array is not 1-D and floating.
        """
        _check_real(values)
        return int(np.count_nonzero(np.abs(values) > np.float64(self.bound)))

    def decode_sum(self, total: RingVector, *, survivors: int) -> npt.NDArray[np.float64]:
        """The sum of the clipped real vectors behind a ring sum, each coordinate within `survivors / scale` of it.

        Args:
            total: [d] of the ring's dtype, the sum of `survivors` encoded vectors.
            survivors: how many there were, at most `cohort`.

        Raises:
            EncodingError: more survivors than the encoding allows, another dtype, or a coordinate that no sum
                of that many honest encodings can have.
        """
        if not 1 <= survivors <= self.cohort:
            raise EncodingError(f"a sum of {survivors} vectors; the encoding is for 1 to {self.cohort}")
        if total.dtype != self._dtype or total.ndim != 1:
            raise EncodingError(f"a sum has dtype {self._dtype} and one axis, not {total.dtype} and {total.ndim}")
        signed = self.signed(total)
        limit = survivors * self.level
        outside = (signed > limit) | (signed < -limit)
        if outside.any():
            raise EncodingError(
                f"coordinate {int(np.argmax(outside))} of the sum is {int(signed[np.argmax(outside)])} steps; "
                f"{survivors} clients can reach {limit}",
                hint="a client did not keep to the bound",
            )
        sums: npt.NDArray[np.float64] = signed / self.scale
        return sums

    def reduce(self, vector: RingVector) -> None:
        """Take words of the ring's dtype modulo 2^b, in place."""
        if self.ring_bits != self._dtype.itemsize * 8:
            vector &= self._dtype.type((1 << self.ring_bits) - 1)

    def signed(self, total: RingVector) -> npt.NDArray[np.int64]:
        """Ring elements as the integers in [-2^(b-1), 2^(b-1)) they stand for, in steps of 1 / scale.

        `decode_sum` also checks that the sum is one that honest encodings can have; a sum that carries noise is read
        by this alone.
        """
        word_bits = self._dtype.itemsize * 8
        # Shifting the sign bit of Z_{2^b} to the word's own and back extends it (arithmetic shift of a signed
        # word).
        spare = word_bits - self.ring_bits
        shifted = (total << self._dtype.type(spare)).view(np.dtype(f"i{self._dtype.itemsize}"))
        signed: npt.NDArray[np.int64] = (shifted >> spare).astype(np.int64)
        return signed


def _check_real(values: npt.NDArray[np.floating[Any]]) -> None:
    if values.ndim != 1 or values.dtype not in (np.float32, np.float64):
        raise EncodingError(f"a vector to encode is 1-D, float32 or float64, not {values.ndim}-D and {values.dtype}")
