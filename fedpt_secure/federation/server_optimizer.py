"""What the server makes of a mean update. Post-processing of what clients released: it costs no privacy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

ADAM_SECOND_MOMENT_DECAY = 0.95
ADAM_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """FedAvg, FedAvgM or FedAdam (Reddi et al. 2021, Algorithm 2) over the adapter vector.

    `average` adds the mean update as it is. `momentum` adds a running sum of updates. `adam` divides the running mean
    by the root of a running mean square, both corrected for their start: under heavy noise all coordinates have about
    the same mean square, so it works like momentum with a step size that does not depend on clip norm or cohort.
    """

    kind: Literal["average", "momentum", "adam"]
    learning_rate: float
    momentum: float
    first_moment: Vector
    second_moment: Vector
    steps: int = 0

    @classmethod
    def fresh(
        cls, kind: Literal["average", "momentum", "adam"], *, learning_rate: float, momentum: float, dimension: int
    ) -> ServerOptimizer:
        """An optimizer that has seen nothing."""
        zeros = np.zeros(dimension)
        return cls(kind, learning_rate, momentum, zeros, zeros.copy())

    def apply(
        self, weights: npt.NDArray[np.float32], mean_update: Vector
    ) -> tuple[npt.NDArray[np.float32], ServerOptimizer]:
        """Move the weights by one mean update `[d]`; returns the new weights and the optimizer after the step."""
        steps = self.steps + 1
        if self.kind == "average":
            moved = weights + self.learning_rate * mean_update
            return moved.astype(np.float32), replace(self, steps=steps)
        if self.kind == "momentum":
            first = self.momentum * self.first_moment + mean_update
            moved = weights + self.learning_rate * first
            return moved.astype(np.float32), replace(self, first_moment=first, steps=steps)
        first = self.momentum * self.first_moment + (1 - self.momentum) * mean_update
        decay = ADAM_SECOND_MOMENT_DECAY
        second = decay * self.second_moment + (1 - decay) * mean_update**2
        direction = (first / (1 - self.momentum**steps)) / (np.sqrt(second / (1 - decay**steps)) + ADAM_EPSILON)
        moved = weights + self.learning_rate * direction
        return moved.astype(np.float32), replace(self, first_moment=first, second_moment=second, steps=steps)
