"""An average of the server's iterates, for what a run leaves behind. Post-processing: it costs no privacy.

Under noise the last iterate carries the last rounds' noise in full; an average of iterates carries less of it, and
lags behind by about `1 / (1 - decay)` rounds (Polyak and Juditsky 1992; De et al. 2022 for DP-SGD). Training goes on
from the iterates themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class IterateAverage:
    """Exponential moving average of the adapters after each round's step, corrected for its start.

    Attributes:
        decay: weight of the past, in [0, 1); 0 keeps the last iterate alone.
        total: sum of iterates, each times `(1 - decay) decay^(steps since)`, float64 `[d]`.
        steps: iterates that are in it.
    """

    decay: float
    total: npt.NDArray[np.float64]
    steps: int = 0

    @classmethod
    def fresh(cls, decay: float, *, dimension: int) -> IterateAverage:
        """An average of nothing."""
        return cls(decay, np.zeros(dimension))

    def with_iterate(self, weights: npt.NDArray[np.float32]) -> IterateAverage:
        """The average with one more iterate `[d]`."""
        total = self.decay * self.total + (1 - self.decay) * weights.astype(np.float64)
        return replace(self, total=total, steps=self.steps + 1)

    def value(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The averaged adapter `[d]`: a convex combination of the iterates; `weights` where there are none yet."""
        if self.steps == 0:
            return weights
        return (self.total / (1 - self.decay**self.steps)).astype(np.float32)
