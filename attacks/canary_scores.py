"""How strongly a release speaks for each canary: the best adversary of a Gaussian mechanism.

The adversary of the privacy statement knows everything but the coins. A release is, in clip norms,

    y = sum of clipped gradients of the records known to be there + sum_i c_i g_i + noise,

with g_i the clipped gradient of canary i at the adapter the round began with, and c_i its coin. Less the known sum, y
is a linear model in the coins: c is estimated by least squares, and the log-likelihood ratio of a coin is
(c_i - 1/2) / variance_i up to the noise's constant. Ratios of several rounds add up.

Where a release has several steps, or a step samples records (rate q < 1), the known sum and the coins count steps x q
times; what sampling adds is noise, and gradients are those of the first step, on all tokens. That costs power, never
validity: the bound holds for whatever guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SmallExample, clipped_sum

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReleaseView:
    """One thing that the strongest adversary sees, and all it knows beside it.

    Attributes:
        noised_sum: what was released, as a sum of gradients in clip norms, `[d]`.
        adapter: that the gradients were taken at, `[d]`.
        clip_norm: that they were clipped to.
        known: records whose gradients are in the sum for sure.
        canaries: indices of the canaries that may be in it.
        examples: these canaries' examples, in the same order.
    """

    noised_sum: FloatArray
    adapter: npt.NDArray[np.float32]
    clip_norm: float
    known: Sequence[SmallExample]
    canaries: Sequence[int]
    examples: Sequence[SmallExample]

    @property
    def gradients(self) -> int:
        """How many gradients its scores cost."""
        return len(self.known) + len(self.examples)


def release_scores(
    views: Iterator[ReleaseView] | Sequence[ReleaseView],
    canaries: int,
    small: SmallLM,
    *,
    uses: float,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """A score for each canary, and which of them are in some view; the others have 0.

    Args:
        small: the model behind the gradients; its adapter is put back.
        uses: how often a record is in a release on average: steps times sampling rate.
        advance: told how many gradients are done.
    """
    scores, seen = np.zeros(canaries), np.zeros(canaries, dtype=np.bool_)
    before = small.adapter_vector()
    try:
        for view in views:
            small.load_adapter_vector(view.adapter)
            directions = np.array([_clipped(small, [example], view.clip_norm) for example in view.examples])
            rest = view.noised_sum - uses * _clipped(small, view.known, view.clip_norm)
            estimate, variance = least_squares(directions, rest)
            index = np.asarray(view.canaries)
            scores[index] += (estimate - uses / 2) / variance
            seen[index] = True
            advance(view.gradients)
    finally:
        small.load_adapter_vector(before)
    return scores, seen


def _clipped(small: SmallLM, examples: Sequence[SmallExample], clip_norm: float) -> FloatArray:
    return clipped_sum(small, examples, clip_norm=clip_norm).vector / clip_norm


def least_squares(directions: FloatArray, target: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients of `target` on the rows of `directions` `[k, d]`, and their variances for unit noise, `[k]` each.

    Rows that (nearly) depend on others get large variances; a small ridge keeps the system solvable where k > d.
    """
    gram = directions @ directions.T
    gram[np.diag_indices_from(gram)] += 1e-9 * max(float(np.trace(gram)) / len(gram), 1e-12)
    inverse = np.linalg.inv(gram)
    return inverse @ (directions @ target), np.maximum(np.diag(inverse), 1e-12)
