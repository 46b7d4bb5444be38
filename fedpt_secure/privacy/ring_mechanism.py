"""The Gaussian mechanism with noise born in pieces, in the ring of secure aggregation.

Each client encodes its vector to integers and adds a discrete Gaussian share; the secure sum carries the sum of the
shares. With h honest shares of parameter s the noise is that of one Gaussian of standard deviation s sqrt(h), up to a
privacy loss below `SLACK_PER_STEP` (docs/privacy.md, "Noise born in pieces", has the proof). The parts:

- sums of discrete Gaussians are nearly discrete Gaussian (Kairouz, Liu and Steinke 2021, arXiv 2102.06387);
- a discrete Gaussian is nearly a rounded continuous one, so that the tight accountant of the latter applies (ours);
- rounding a vector to integers can push two neighbouring vectors apart by at most one more step a coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto import FixedPointEncoding
from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy.accounting import SLACK_PER_STEP
from fedpt_secure.privacy.discrete_gaussian import LARGEST_SIGMA
from fedpt_secure.privacy.noise import NoiseSource

SMALLEST_SHARE = 1_000
"""Parameter of a share from which on the discrete Gaussian's own gaps (terms in exp(-pi^2 s^2)) are below 1e-300."""
LARGEST_INFLATION = 0.05
"""Most by which rounding may raise the sensitivity; more would waste the budget, and a larger ring avoids it."""
FLOAT_ALLOWANCE = 1e-3
"""Relative error granted to the floating-point gradients: clipped vectors may be this much longer than they claim."""
NOISE_TAIL = 10.0
"""Standard deviations of the whole noise that the ring has room for; beyond, a coordinate of the sum would wrap, which
costs accuracy (chance below 1e-22 a coordinate), never privacy."""
_TAIL_EXPONENT = 100.0  # chance e^-100 that the norm of the noise is larger than the proof assumes


@dataclass(frozen=True, slots=True)
class RingMechanism:
    """One round's mechanism, from its public constants alone; client and server derive the same one.

    A *unit* is what is protected (a record, or a client). Vectors are in clip norms: one unit's part has L2 norm of at
    most `unit_norm`.

    Attributes:
        encoding: integers for vectors whose coordinates lie within `encoding.bound`.
        cohort: most vectors in a sum.
        dimension: of the vectors.
        unit_norm: L2 norm of one unit's part of a vector, in clip norms.
        honest_shares: fewest shares of honest clients in any sum that is opened.
        share_sigma: parameter of each client's discrete Gaussian, in ring steps; 0 is not private.
    """

    encoding: FixedPointEncoding
    cohort: int
    dimension: int
    unit_norm: float
    honest_shares: int
    share_sigma: int

    @classmethod
    def plan(
        cls,
        *,
        noise_multiplier: float,
        honest_shares: int,
        cohort: int,
        dimension: int,
        coordinate_bound: float,
        ring_bits: int,
        unit_norm: float = 1.0,
    ) -> RingMechanism:
        """The finest grid on which signal and noise fit the ring.

        Args:
            noise_multiplier: wanted ratio of the honest shares' standard deviation to the sensitivity; 0 for no noise.
            coordinate_bound: clients clip each coordinate to this many clip norms. A projection, so that it costs
                no privacy; it must be public.

        Raises:
            PrivacyError: the ring is too small for the proof or for its price, or no share is honest.
        """
        if not 1 <= honest_shares <= cohort:
            raise PrivacyError(
                f"{honest_shares} honest shares of a cohort of {cohort}: at least one survivor must be honest, and no "
                "more clients can survive than take part",
                hint="a larger --minimum-survivors, or fewer tolerated corrupt clients",
            )
        if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
            raise PrivacyError(f"noise multiplier {noise_multiplier} is not a finite number of 0 or more")
        if not (math.isfinite(unit_norm) and unit_norm > 0):
            raise PrivacyError(f"unit norm {unit_norm} is not a finite number above 0")

        def at(slots: int) -> RingMechanism:
            encoding = FixedPointEncoding(ring_bits=ring_bits, bound=coordinate_bound, cohort=slots)
            plain = cls(encoding, cohort, dimension, unit_norm, honest_shares, share_sigma=0)
            share = math.ceil(noise_multiplier * plain.sensitivity / math.sqrt(honest_shares))
            return cls(encoding, cohort, dimension, unit_norm, honest_shares, share)

        # More slots make coarser steps, so that the noise takes fewer of them: the first number that fits is best.
        most = 2 ** (ring_bits - 1) - 1
        low, high = cohort - 1, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle)._fits() else (middle, high)
        mechanism = at(high)
        mechanism._check()
        return mechanism

    @property
    def sensitivity(self) -> float:
        """L2 distance, in ring steps, between encodings of vectors that differ in one unit."""
        return float(self.encoding.scale * self.unit_norm * (1 + FLOAT_ALLOWANCE) + math.sqrt(self.dimension))

    def noise_multiplier(self, honest_shares: int) -> float:
        """Standard deviation of this many shares over the sensitivity."""
        return self.share_sigma * math.sqrt(honest_shares) / self.sensitivity

    @property
    def slack(self) -> float:
        """Bound on what discreteness adds to the privacy loss of one step (docs/privacy.md)."""
        if self.share_sigma == 0:
            return 0.0
        sigma = self.share_sigma * math.sqrt(self.honest_shares)
        below = self.dimension / (24 * sigma**2)
        root = math.sqrt(self.dimension)
        norm = sigma * math.sqrt(self.dimension + 2 * root * math.sqrt(_TAIL_EXPONENT) + 2 * _TAIL_EXPONENT)
        norm += root / 2 + self.sensitivity
        return 1.001 * (below + norm**2 / (8 * sigma**4))

    def encode(self, vector: npt.NDArray[np.float64], noise: NoiseSource) -> npt.NDArray[np.unsignedinteger]:
        """A client's noised ring vector: what it hands to secure aggregation, and the release itself.

        Args:
            vector: [dimension], in clip norms.
            noise: rounding and the share; a source is used for one round only.

        Raises:
            PrivacyError: another dimension.
            EncodingError: a coordinate is not finite.
        """
        if vector.shape != (self.dimension,):
            raise PrivacyError(f"vector of shape {vector.shape}; the mechanism is for [{self.dimension}]")
        encoded = self.encoding.encode(vector, random_bytes=noise.random_bytes)
        if self.share_sigma:
            encoded += noise.discrete_gaussian(self.dimension, sigma=self.share_sigma).astype(encoded.dtype)
            self.encoding.reduce(encoded)
        return encoded

    def decode(self, total: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.float64]:
        """The noised sum behind a ring sum, in clip norms `[dimension]`."""
        return np.asarray(self.encoding.signed(total) / self.encoding.scale)

    def _fits(self) -> bool:
        noise = NOISE_TAIL * self.share_sigma * math.sqrt(self.cohort)
        room = 2 ** (self.encoding.ring_bits - 1) - 1
        return self.cohort * self.encoding.level + noise <= room and self.share_sigma <= LARGEST_SIGMA

    def _check(self) -> None:
        inflation = self.sensitivity / (self.encoding.scale * self.unit_norm) - 1
        hint = "a larger --ring-bits, fewer trained parameters, a smaller cohort or a smaller coordinate bound"
        if not self._fits() or inflation > LARGEST_INFLATION:
            raise PrivacyError(
                f"a ring of {self.encoding.ring_bits} bits is too small for {self.cohort} clients and {self.dimension} "
                f"parameters: rounding would raise the sensitivity by {inflation:.0%}, allowed are "
                f"{LARGEST_INFLATION:.0%}",
                hint=hint,
            )
        if self.share_sigma and (self.share_sigma < SMALLEST_SHARE or self.slack > SLACK_PER_STEP):
            raise PrivacyError(
                f"noise shares of {self.share_sigma} ring steps are too coarse for the proof, which needs "
                f"{SMALLEST_SHARE} and a slack of {SLACK_PER_STEP:g} (here {self.slack:.2g})",
                hint=hint,
            )
