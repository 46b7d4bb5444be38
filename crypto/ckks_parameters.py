"""CKKS parameters for sums: what makes them secure, what keeps a sum from wrapping, and how exact it is.

Pure arithmetic; TenSEAL is not needed. `docs/ckks.md` derives the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fedpt_secure.crypto.errors import InsecureParameters, ParameterError

LARGEST_MODULUS_BITS: Final = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Degree of the polynomial -> bits of the largest modulus with 128-bit classical security, for a ternary secret and
errors of standard deviation 3.2 (Albrecht et al., Homomorphic Encryption Standard, 2018, eprint 2019/939, Table 1)."""

SECURITY_BITS: Final = 128

ERROR_VARIANCE: Final = 10.75
"""Sub-Gaussian variance proxy of one coefficient's error in a fresh symmetric ciphertext: 42 fair halves (SEAL's
centred binomial, 42/4) and the rounding of the encoder (1/4)."""

_LARGEST_COEFFICIENT_ERROR: Final = 21.5  # the same, in the worst case
_UNIT_ROUNDOFF: Final = 2.0**-53
_FFT_ERROR: Final = 16  # two transforms of relative l2 error at most 8 log2(N) u (Higham 2002, theorem 24.2)
_FAILURE: Final = 2.0**-40  # chance with which the error bounds may fail
_LARGEST_SCALE_BITS: Final = 100  # far beyond what double precision, in which TenSEAL decodes, can tell apart
_LARGEST_RELATIVE_ERROR: Final = 2.0**-8
_LARGEST_ANSWER: Final = 2**31 - 1
_SMALLEST_PRIME_BITS: Final = 16
_LARGEST_PRIME_BITS: Final = 60
_NOISE_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CkksParameters:
    """Parameters of one encrypted sum: at most `cohort` vectors of `length` coordinates within `bound`.

    **Guarantees**

    - 128-bit security of a ciphertext against whoever lacks the key, as far as ring-LWE goes: the whole modulus, its
      last prime included, is within the standard's table.
    - No wrap: cohort * (bound * scale + error) < q / 2, where q is the product of all primes but the last (SEAL keeps
      that one for key switching, which a sum does not need).
    - `error_bound` holds for every coordinate of a sum at once, except with probability 2^-39.

    Attributes:
        degree: N of Z[X]/(X^N + 1), a power of two; a ciphertext holds N/2 coordinates.
        prime_bits: sizes of the primes; two or more.
        scale_bits: a coordinate x is encoded as x * 2^scale_bits.
        flooding_bits: s; what a released sum says about the key is 2^-s close to nothing, in statistical distance.
        cohort: most vectors that may be summed.
        bound: largest magnitude of a coordinate.
        length: coordinates of a vector.

    Raises:
        InsecureParameters: the modulus is too large for the degree.
        ParameterError: the sum could wrap, would be too inexact, or a value is out of range.
    """

    degree: int = 4096
    prime_bits: tuple[int, ...] = (60, 20)
    scale_bits: int
    flooding_bits: int = 24
    cohort: int
    bound: float
    length: int

    def __post_init__(self) -> None:
        largest = LARGEST_MODULUS_BITS.get(self.degree)
        if largest is None:
            raise InsecureParameters(f"the degree is {self.degree}; it must be one of {sorted(LARGEST_MODULUS_BITS)}")
        if sum(self.prime_bits) > largest:
            raise InsecureParameters(
                f"a modulus of {sum(self.prime_bits)} bits has less than {SECURITY_BITS} bits of security at degree "
                f"{self.degree}, where at most {largest} are allowed",
                hint="a larger degree or fewer bits",
            )
        if problems := list(self._problems()):
            raise ParameterError("; ".join(problems), hint="CkksParameters.fitted chooses the scale")

    @classmethod
    def fitted(
        cls,
        *,
        cohort: int,
        bound: float,
        length: int,
        degree: int = 4096,
        prime_bits: tuple[int, ...] = (60, 20),
        flooding_bits: int = 24,
    ) -> CkksParameters:
        """The parameters with the largest scale that cannot wrap.

        Raises:
            InsecureParameters: the modulus is too large for the degree.
            ParameterError: no scale is exact enough, or a value is out of range.
        """
        room = 2.0 ** (sum(bits - 1 for bits in prime_bits[:-1]) - 1)
        usable = cohort >= 1 and math.isfinite(bound) and bound > 0 and room > cohort * _LARGEST_COEFFICIENT_ERROR
        # Values that make no sense keep a scale of 0 bits and are refused by the constructor, all at once.
        scale_bits = min(math.floor(math.log2(room / (cohort * bound))), _LARGEST_SCALE_BITS) if usable else 0
        while usable and scale_bits > 0 and not _fits(cohort, bound, scale_bits, room):
            scale_bits -= 1
        return cls(
            degree=degree,
            prime_bits=prime_bits,
            scale_bits=scale_bits,
            flooding_bits=flooding_bits,
            cohort=cohort,
            bound=float(bound),
            length=length,
        )

    def _problems(self) -> Iterator[str]:
        sizes = self.prime_bits
        if len(sizes) < 2 or not all(_SMALLEST_PRIME_BITS <= bits <= _LARGEST_PRIME_BITS for bits in sizes):
            yield f"prime_bits is {sizes}; two or more primes of {_SMALLEST_PRIME_BITS} to {_LARGEST_PRIME_BITS} bits"
            return
        if not (math.isfinite(self.bound) and self.bound > 0):
            yield f"the bound is {self.bound}; it must be positive and finite"
            return
        for name, value, least, most in (
            ("scale_bits", self.scale_bits, 1, _LARGEST_SCALE_BITS),
            ("flooding_bits", self.flooding_bits, 16, 40),
            ("cohort", self.cohort, 1, 1 << 16),
            ("length", self.length, 1, 1 << 31),
        ):
            if not least <= value <= most:
                yield f"{name} is {value}; it must lie in {least}..{most}"
                return
        if not _fits(self.cohort, self.bound, self.scale_bits, 2.0 ** (self.modulus_bits - 1)):
            yield (
                f"{self.cohort} vectors within {self.bound:g} at scale 2^{self.scale_bits} may wrap modulo q, which "
                f"exceeds 2^{self.modulus_bits}"
            )
            return
        if self.error_bound > self.cohort * self.bound * _LARGEST_RELATIVE_ERROR:
            yield (
                f"a sum of {self.cohort} vectors within {self.bound:g} would carry errors up to "
                f"{self.error_bound:.3g}; a mean may be wrong by {_LARGEST_RELATIVE_ERROR:g} of the bound at most; "
                "fewer flooding_bits or a larger modulus"
            )
        if self.cohort * self.bound + self.error_bound > _LARGEST_ANSWER * self.step:
            yield f"a sum of {self.flooding_bits} flooding bits does not fit into 32-bit steps"

    @property
    def modulus_bits(self) -> int:
        """A floor: q, the product of all primes but the last, exceeds 2^modulus_bits."""
        return sum(bits - 1 for bits in self.prime_bits[:-1])

    @property
    def slots(self) -> int:
        """Coordinates in one ciphertext."""
        return self.degree // 2

    @property
    def ciphertexts(self) -> int:
        """Ciphertexts of one vector."""
        return -(-self.length // self.slots)

    @property
    def scale(self) -> float:
        """What a coordinate is multiplied by, 2^scale_bits."""
        return 2.0**self.scale_bits

    @property
    def largest_ciphertext_bytes(self) -> int:
        """No serialised ciphertext is longer: its words, what an incompressible block adds, and the framing."""
        return _framed(2 * (len(self.prime_bits) - 1) * self.degree * 8)

    @property
    def largest_key_bytes(self) -> int:
        """No serialised secret key is longer."""
        return _framed(len(self.prime_bits) * self.degree * 8)

    @property
    def lattice_error(self) -> float:
        """Sub-Gaussian standard deviation of one coordinate's ring-LWE error in a sum of `cohort` ciphertexts."""
        return math.sqrt(self.slots * ERROR_VARIANCE * self.cohort) / self.scale

    @property
    def rounding_error(self) -> float:
        """Bound on the l2 error that double precision leaves in one ciphertext's coordinates of the decoded sum."""
        norm = self.cohort * self.bound * math.sqrt(self.slots)
        return _FFT_ERROR * math.log2(self.degree) * _UNIT_ROUNDOFF * norm

    @property
    def sensitivity(self) -> float:
        """l2 distance between the decoded and the exact sum, which depends on the key's error terms: bounded except
        with probability 2^-40 (Hsu, Kakade and Zhang 2012, theorem 2.1, for the lattice part)."""
        failing = -math.log(_FAILURE)
        lattice = self.lattice_error * math.sqrt(self.length + 2 * math.sqrt(self.length * failing) + 2 * failing)
        return lattice + self.rounding_error * math.sqrt(self.ciphertexts)

    @property
    def flooding_deviation(self) -> float:
        """Standard deviation of the noise that is added before a sum is released: sensitivity * 2^(s - 1).

        By Pinsker's inequality two Gaussians whose means are `sensitivity` apart are then at most 2^-s apart in
        statistical distance.
        """
        return self.sensitivity * 2.0 ** (self.flooding_bits - 1)

    @property
    def step(self) -> float:
        """Released sums are multiples of this power of two, a sixteenth of the noise or less."""
        return 2.0 ** math.floor(math.log2(self.flooding_deviation / _NOISE_STEPS))

    @property
    def error_bound(self) -> float:
        """Largest error of any coordinate of a released sum, noise included, except with probability 2^-39."""
        deviations = math.sqrt(2 * math.log(2 * self.length / _FAILURE))
        return (self.lattice_error + self.flooding_deviation) * deviations + self.rounding_error + self.step / 2


def _fits(cohort: int, bound: float, scale_bits: int, half_modulus: float) -> bool:
    # 2^-40 covers the encoder's own rounding in double precision.
    return cohort * (bound * 2.0**scale_bits * (1 + 2.0**-40) + _LARGEST_COEFFICIENT_ERROR) < half_modulus


def _framed(content: int) -> int:
    return content + content // 128 + 1024
