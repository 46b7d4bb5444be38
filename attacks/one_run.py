"""A lower bound of epsilon from one training run with canaries (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

m records are included by independent fair coins. An auditor guesses r of the coins and is right v times. If the run is
(eps, delta)-DP with respect to adding or removing one record, then whatever the guesses are made from (Theorem 5.2),

    P[v or more right] <= p(eps) = P[W >= v] + 2 m delta max_{1 <= i <= v} P[v > W >= v - i] / i,

with W ~ Bin(r, q) and q = e^eps / (1 + e^eps). So eps_lb = sup {eps : p(eps) < alpha} misses with a chance of at most
alpha. r must be fixed before the scores are seen: here one of five, with alpha divided by five (taking the best of
many without that makes false claims in a fifth of all audits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from fedpt_secure.attacks.operating_points import auc, histogram, roc

FloatArray = npt.NDArray[np.float64]

FRACTIONS = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Of the canaries, how many are guessed: fixed before any score is seen."""
_LARGEST_EPSILON = 60.0


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """`p(eps)` of the module's docstring: how probable an (eps, delta)-DP run can make so many right guesses.

    >>> round(p_value(canaries=1000, guesses=600, correct=600, epsilon=4.0, delta=1e-5), 8)
    0.00126256
    """
    if correct <= 0:
        return 1.0
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, q))
    if delta == 0:
        return tail
    # Beyond some i the difference has reached 1 - tail and only its divisor grows: later i cannot be the maximum.
    far = correct - int(binom.ppf(1e-12, guesses, q))
    steps = np.arange(1, max(1, min(correct, far)) + 1)
    between = binom.sf(correct - steps - 1, guesses, q) - tail
    return min(1.0, tail + 2 * canaries * delta * float((between / steps).max()))


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """The largest epsilon that so many right guesses contradict at `alpha`; 0 where they contradict none.

    Always finite: with all guesses right it is about log(guesses / log(1 / alpha)).
    """

    def contradicted(epsilon: float) -> bool:
        found = p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return found < alpha

    if not contradicted(0.0):
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if contradicted(middle) else (low, middle)
    return low


def guess_counts(canaries: int) -> tuple[int, ...]:
    """The numbers of guesses that are tried, even, at least 2, ascending."""
    return tuple(sorted({max(2, 2 * round(fraction * canaries / 2)) for fraction in FRACTIONS if canaries >= 2}))


def right_guesses(scores: FloatArray, included: npt.NDArray[np.bool_], guesses: int) -> int:
    """Guess "in" for the highest half of `guesses` scores and "out" for the lowest half; how many are right.

    Ties are broken by position, which knows nothing of the coins.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int((~included[order[:half]]).sum() + included[order[-half:]].sum())


def detectable_epsilon(*, canaries: int, delta: float, alpha: float) -> float:
    """The bound that flawless guesses would give: what this many canaries could have detected at best."""
    return max(
        (
            epsilon_lower_bound(canaries=canaries, guesses=r, correct=r, delta=delta, alpha=alpha / len(FRACTIONS))
            for r in guess_counts(canaries)
        ),
        default=0.0,
    )


def analyse_canaries(
    scores: FloatArray,
    included: npt.NDArray[np.bool_],
    *,
    delta: float,
    alpha: float,
    claimed: float | None,
) -> dict[str, Any]:
    """Bound, what could have been detected, and the curves (docs/audits.md has the fields).

    Args:
        scores: higher where inclusion is more likely, `[m]`.
        included: the coins, `[m]`.
        alpha: of the whole; each number of guesses gets a fifth.
        claimed: epsilon to give p-values at; None for none.
    """
    m = len(scores)
    rows: Sequence[tuple[int, int]] = [(r, right_guesses(scores, included, r)) for r in guess_counts(m)]
    bounds = [
        epsilon_lower_bound(canaries=m, guesses=r, correct=v, delta=delta, alpha=alpha / len(FRACTIONS))
        for r, v in rows
    ]
    both = bool(included.any() and not included.all())
    return {
        "epsilon_lower_bound": max(bounds, default=0.0),
        "detectable_epsilon": detectable_epsilon(canaries=m, delta=delta, alpha=alpha),
        "guesses": [
            {
                "guesses": r,
                "correct": v,
                "epsilon_lower_bound": bound,
                "p_at_claim": None
                if claimed is None
                else p_value(canaries=m, guesses=r, correct=v, epsilon=claimed, delta=delta),
            }
            for (r, v), bound in zip(rows, bounds, strict=True)
        ],
        "auc": auc(scores[included], scores[~included]) if both else None,
        "roc": roc(scores[included], scores[~included]) if both else None,
        "histogram": histogram(scores[included], scores[~included]) if both else None,
    }
