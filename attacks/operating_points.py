"""What scores of members and non-members prove: ROC, AUC, accuracy and true positives at few false ones.

Every threshold is chosen on one half of the scores and judged on the other, so that no figure is of the best of many.
Scores are higher where membership is more likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, norm, rankdata

FloatArray = npt.NDArray[np.float64]

LEVELS = (0.01, 0.001)
"""False-positive rates at which true positives are reported."""
_MOST_POINTS = 400
_BINS = 40


def clopper_pearson(count: int, trials: int, *, alpha: float) -> tuple[float, float]:
    """The exact interval of a binomial proportion; it misses the true one with a chance of at most `alpha`.

    Clopper and Pearson 1934: `beta.ppf(a/2, k, n-k+1)` and `beta.ppf(1-a/2, k+1, n-k)`. Without trials: [0, 1].
    """
    low = 0.0 if count == 0 else float(beta.ppf(alpha / 2, count, trials - count + 1))
    high = 1.0 if count >= trials else float(beta.ppf(1 - alpha / 2, count + 1, trials - count))
    return low, high


def auc(members: FloatArray, others: FloatArray, *, alpha: float = 0.05) -> dict[str, float]:
    """Area under the ROC curve, the chance that a member outscores a non-member, ties counting half.

    The interval is DeLong's (DeLong, DeLong and Clarke-Pearson 1988) on the logit scale. Where one class lies wholly
    above the other its variance is 0; the interval is then the one of as many independent pairs as the smaller class
    has members, by Clopper-Pearson.
    """
    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    pairs = min(m, n)
    if not 0 < value < 1 or pairs < 2:
        low, high = clopper_pearson(round(value * pairs), pairs, alpha=alpha)
        return {"value": value, "low": min(low, value), "high": max(high, value)}
    above = (ranks[:m] - rankdata(members)) / n
    below = 1 - (ranks[m:] - rankdata(others)) / m
    deviation = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    logit, scale = math.log(value / (1 - value)), deviation / (value * (1 - value))
    reach = float(norm.ppf(1 - alpha / 2)) * scale
    return {"value": value, "low": _logistic(logit - reach), "high": _logistic(logit + reach)}


def ceiling(fpr: float, *, epsilon: float | None, delta: float) -> float:
    """The largest true-positive rate that (epsilon, delta)-DP allows at a false-positive rate.

    Kairouz, Oh and Viswanath 2015: min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR)). 1 where nothing is claimed.
    """
    if epsilon is None:
        return 1.0
    first = math.exp(min(epsilon, 700.0)) * fpr + delta
    second = 1 - math.exp(-epsilon) * max(0.0, 1 - delta - fpr)
    return min(1.0, first, second)


def ceiling_curve(*, epsilon: float | None, delta: float) -> dict[str, list[float]]:
    """The ceiling on a logarithmic grid, for a log-log plot."""
    fpr = np.logspace(-4, 0, 81)
    return {"fpr": fpr.tolist(), "tpr": [ceiling(float(x), epsilon=epsilon, delta=delta) for x in fpr]}


def roc(members: FloatArray, others: FloatArray) -> dict[str, list[float]]:
    """False- and true-positive rates at every threshold, thinned to a few hundred points, the ends kept."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    fpr = np.searchsorted(np.sort(-others), -thresholds, side="right") / len(others)
    tpr = np.searchsorted(np.sort(-members), -thresholds, side="right") / len(members)
    fpr, tpr = np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])
    if len(fpr) > _MOST_POINTS:
        # Denser where false positives are few: that is the part which matters.
        kept = np.unique((np.linspace(0, 1, _MOST_POINTS) ** 2 * (len(fpr) - 1)).astype(int))
        fpr, tpr = fpr[kept], tpr[kept]
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def histogram(members: FloatArray, others: FloatArray) -> dict[str, list[float]]:
    """Counts of both classes over common bins that hold all but the outermost half per cent."""
    both = np.concatenate([members, others])
    low, high = np.quantile(both, [0.005, 0.995])
    if not high > low:
        low, high = float(both.min()) - 0.5, float(both.max()) + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    counts = [np.histogram(np.clip(side, low, high), bins=edges)[0].tolist() for side in (members, others)]
    return {"edges": edges.tolist(), "members": counts[0], "non_members": counts[1]}


def analyse(
    members: FloatArray,
    others: FloatArray,
    *,
    epsilon: float | None,
    delta: float,
    rng: np.random.Generator,
    alpha: float = 0.05,
    levels: Sequence[float] = LEVELS,
) -> dict[str, Any]:
    """All figures of one attack (docs/audits.md has the fields).

    Args:
        members, others: scores; at least 4 of each.
        epsilon: claimed; None where nothing is.
        rng: splits each class into the half that chooses thresholds and the half that judges them.
        alpha: of every interval, one by one.
    """
    chooses, judges = zip(*(_halves(side, rng) for side in (members, others)), strict=True)
    return {
        "auc": auc(members, others, alpha=alpha),
        "balanced_accuracy": _balanced_accuracy(chooses, judges, alpha=alpha),
        "at_fpr": [_at_level(level, chooses[1], judges, epsilon=epsilon, delta=delta, alpha=alpha) for level in levels],
        "roc": roc(members, others),
        "histogram": histogram(members, others),
    }


def _halves(scores: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    order = rng.permutation(len(scores))
    middle = len(scores) // 2
    return scores[order[:middle]], scores[order[middle:]]


def _balanced_accuracy(
    chooses: tuple[FloatArray, ...], judges: tuple[FloatArray, ...], *, alpha: float
) -> dict[str, float]:
    members, others = (np.sort(side) for side in chooses)
    thresholds = np.unique(np.concatenate([members, others]))
    hits = 1 - np.searchsorted(members, thresholds) / len(members)
    rejections = np.searchsorted(others, thresholds) / len(others)
    threshold = float(thresholds[int(np.argmax(hits + rejections))])
    rates = [
        (int((judges[0] >= threshold).sum()), len(judges[0])),
        (int((judges[1] < threshold).sum()), len(judges[1])),
    ]
    # Each proportion gets half of alpha, so that their mean keeps it.
    bounds = [clopper_pearson(count, trials, alpha=alpha / 2) for count, trials in rates]
    return {
        "value": sum(count / trials for count, trials in rates) / 2,
        "low": sum(low for low, _ in bounds) / 2,
        "high": sum(high for _, high in bounds) / 2,
    }


def _at_level(
    level: float,
    others: FloatArray,
    judges: tuple[FloatArray, ...],
    *,
    epsilon: float | None,
    delta: float,
    alpha: float,
) -> dict[str, Any]:
    """The lowest threshold that at most a fraction `level` of one half's non-members pass, judged on the other half."""
    allowed = math.floor(level * len(others))
    threshold = float(np.sort(others)[::-1][allowed])
    passed = [int((side > threshold).sum()) for side in judges]
    (tpr_low, tpr_high), (fpr_low, fpr_high) = (
        clopper_pearson(count, len(side), alpha=alpha) for count, side in zip(passed, judges, strict=True)
    )
    highest = ceiling(fpr_high, epsilon=epsilon, delta=delta)
    return {
        "level": level,
        "resolvable": len(others) >= 1 / level,
        "tpr": {"value": passed[0] / len(judges[0]), "low": tpr_low, "high": tpr_high},
        "fpr": {"value": passed[1] / len(judges[1]), "low": fpr_low, "high": fpr_high},
        "ceiling": highest,
        "above_ceiling": tpr_low > highest,
    }


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
