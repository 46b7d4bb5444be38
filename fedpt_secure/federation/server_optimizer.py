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
    by the root of a running mean square, both corrected for their start, entry by entry: under heavy noise all
    coordinates have about the same mean square, so it works like momentum with a step size that does not depend on
    clip norm or cohort.

    Attributes:
        seen: how many updates each entry has taken part in, `[d]`.
        steps: updates that were applied.
    """

    kind: Literal["average", "momentum", "adam"]
    learning_rate: float
    momentum: float
    first_moment: Vector
    second_moment: Vector
    seen: Vector
    steps: int = 0

    @classmethod
    def fresh(
        cls, kind: Literal["average", "momentum", "adam"], *, learning_rate: float, momentum: float, dimension: int
    ) -> ServerOptimizer:
        """An optimizer that has seen nothing."""
        zeros = np.zeros(dimension)
        return cls(kind, learning_rate, momentum, zeros, zeros.copy(), zeros.copy())

    def apply(
        self,
        weights: npt.NDArray[np.float32],
        mean_update: Vector,
        *,
        pace: float = 1.0,
        trained: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[npt.NDArray[np.float32], ServerOptimizer]:
        """Move the weights by one mean update `[d]`; returns the new weights and the optimizer after the step.

        Args:
            pace: factor on the learning rate in this step (`pace_of`).
            trained: entries that this round trained, `[d]`; all of them if None. The others stay where they are, and so
                do their moments: an old direction must not go on moving them.
        """
        seen, first, second = self.seen + 1, self.first_moment, self.second_moment
        step = mean_update
        if self.kind == "momentum":
            step = first = self.momentum * first + mean_update
        elif self.kind == "adam":
            first = self.momentum * first + (1 - self.momentum) * mean_update
            decay = ADAM_SECOND_MOMENT_DECAY
            second = decay * second + (1 - decay) * mean_update**2
            step = (first / (1 - self.momentum**seen)) / (np.sqrt(second / (1 - decay**seen)) + ADAM_EPSILON)
        moved = (weights + self.learning_rate * pace * step).astype(np.float32)
        if trained is not None:
            moved = np.where(trained, moved, weights)
            seen = np.where(trained, seen, self.seen)
            first = np.where(trained, first, self.first_moment)
            second = np.where(trained, second, self.second_moment)
        return moved, replace(self, first_moment=first, second_moment=second, seen=seen, steps=self.steps + 1)


def pace_of(round_index: int, *, rounds: int, warm_up: int, cool_down: float) -> float:
    """Factor on the server's learning rate in a round: rises linearly, stays at 1, falls linearly to almost 0.

    Adam's first steps go by single updates, and its last ones, at a constant rate, stay as noisy as the others. The
    factor follows from public numbers alone.

    Args:
        round_index: from 0.
        rounds: of the whole run.
        warm_up: rounds, the first, over which the factor rises to 1.
        cool_down: share of the rounds, at the end, over which it falls; 0 keeps it.
    """
    risen = (round_index + 1) / max(1, warm_up)
    falling = cool_down * rounds
    left = (rounds - round_index) / falling if falling else 1.0
    return min(1.0, risen) * min(1.0, left)
