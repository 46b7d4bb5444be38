"""Adaptive clipping by a private quantile (Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv 1905.03871).

The clip norm follows a quantile of the units' norms: it shrinks while more than the wanted share of them lies below
it, and grows otherwise. The count that decides travels as one more coordinate of the noised vector, with a weight, so
that the same noise protects it. Its cost is a slightly larger sensitivity; there is no second mechanism to compose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import PrivacyError


@dataclass(frozen=True, slots=True)
class QuantileClipping:
    """The public constants of the rule.

    Attributes:
        quantile: share of units whose norm should lie at or below the clip norm.
        learning_rate: of the geometric update; the clip norm changes by at most a factor exp(learning_rate) a round.
        weight: of one unit's indicator, in clip norms. Larger is a less noisy count at a higher price.
        smallest, largest: limits of the clip norm.
    """

    quantile: float
    learning_rate: float
    weight: float
    smallest: float
    largest: float

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise PrivacyError(f"clip quantile {self.quantile} is not in (0, 1)")
        if not 0 < self.smallest <= self.largest < math.inf:
            raise PrivacyError(f"clip norms between {self.smallest} and {self.largest} are no range above 0")
        for name in ("learning_rate", "weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PrivacyError(f"{name} {value} of adaptive clipping is not a finite number above 0")

    @property
    def unit_norm(self) -> float:
        """L2 norm of one unit's gradient and indicator together, in clip norms: the price is this over 1."""
        return math.hypot(1.0, self.weight * max(self.quantile, 1 - self.quantile))

    def coordinate(self, norms: npt.NDArray[np.float64], clip_norm: float) -> float:
        """Weighted sum over units of [norm <= clip norm] - quantile. **Private** until noised."""
        return float(self.weight * (np.count_nonzero(norms <= clip_norm) - self.quantile * norms.size))

    def next_clip_norm(self, clip_norm: float, noised_coordinate: float, *, expected_units: float) -> float:
        """The next round's clip norm; post-processing of the noised coordinate.

        Args:
            expected_units: public estimate of how many units the sum is over.
        """
        excess = noised_coordinate / (self.weight * expected_units)
        moved = clip_norm * math.exp(-self.learning_rate * min(1.0, max(-1.0, excess)))
        return min(self.largest, max(self.smallest, moved))
