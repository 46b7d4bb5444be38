"""Intervals for held-out figures: the percentile bootstrap over records.

A loss per token is a ratio of sums, `sum(nll) / sum(tokens)`, so its uncertainty is that of drawing *records*, not
tokens: tokens of one record are dependent. Records are resampled with replacement and the ratio formed anew
(Efron and Tibshirani 1993, chapter 13). Two arms are compared on the same resamples by giving the difference of their
sums: the pairing removes what makes a record hard for both, which is most of the variance.

Assumption: records are independent draws. Records of one client are not wholly so; where few clients hold many records
each, the intervals are too narrow for statements about new clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import DataError

_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the interval it is known within."""

    value: float
    low: float
    high: float


def bootstrap_rng(seed: int) -> np.random.Generator:
    """The generator that resamples records. Seeded, because an interval should not change between two readings."""
    return np.random.default_rng([seed, 0x626F6F74])  # ASCII "boot": apart from other generators of the same seed


def ratio_interval(
    sums: npt.ArrayLike,
    counts: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """`sum(sums) / sum(counts)` with its percentile bootstrap interval over records.

    Args:
        sums: `[records]`, finite; negative log-likelihoods, or differences of two arms' (before minus after: positive
            is an improvement in nats per token).
        counts: `[records]`, tokens behind each sum; positive.
        rng: `bootstrap_rng`.
        resamples: bootstrap samples.
        level: probability the interval is meant to cover the true ratio with.

    Raises:
        DataError: fewer than two records, a length that differs, or values out of range.
    """
    totals, tokens = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    records = totals.size
    if totals.shape != (records,) or tokens.shape != (records,) or records < 2:
        raise DataError(
            f"a bootstrap needs two records or more with a token count each, not {totals.shape} and {tokens.shape}"
        )
    if not np.isfinite(totals).all() or not (np.isfinite(tokens) & (tokens > 0)).all():
        raise DataError("a bootstrap needs finite sums and positive token counts")
    ratios = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // records)
    for first in range(0, resamples, step):
        chunk = slice(first, min(first + step, resamples))
        drawn = rng.integers(records, size=(chunk.stop - first, records))
        ratios[chunk] = totals[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(float(totals.sum() / tokens.sum()), float(low), float(high))


def improvement_interval(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    counts: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """By how many nats per token the loss fell from one arm to the other, paired by record.

    Raises:
        DataError: as `ratio_interval`.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(f"two arms can be compared on the same records only, not {first.shape} and {second.shape}")
    return ratio_interval(first - second, counts, rng, resamples=resamples, level=level)


def gap_closed(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    ceiling: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate | None:
    """Which share of the loss that `ceiling` gains over `before` is gained by `after`: `sum(b - a) / sum(b - c)`.

    Numerator and denominator are formed on the same resampled records.

    Args:
        before, after, ceiling: `[records]`, negative log-likelihoods of the same tokens.

    Returns:
        None where the gap itself is not known to be there: the ceiling gains nothing, or nothing in some of the
        resamples, so that the share has no finite interval.

    Raises:
        DataError: fewer than two records, lengths that differ, or values that are not finite.
    """
    arms = [np.asarray(values, dtype=np.float64) for values in (before, after, ceiling)]
    records = arms[0].size
    if records < 2 or any(values.shape != (records,) for values in arms):
        raise DataError(f"three arms on the same two records or more are needed, not {[a.shape for a in arms]}")
    if not all(np.isfinite(values).all() for values in arms):
        raise DataError("a bootstrap needs finite sums")
    gained, possible = arms[0] - arms[1], arms[0] - arms[2]
    shares = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // records)
    for first in range(0, resamples, step):
        chunk = slice(first, min(first + step, resamples))
        drawn = rng.integers(records, size=(chunk.stop - first, records))
        gap = possible[drawn].sum(axis=1)
        if not (gap > 0).all():
            return None
        shares[chunk] = gained[drawn].sum(axis=1) / gap
    if not possible.sum() > 0:
        return None
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(gained.sum() / possible.sum()), float(low), float(high))


def fraction_improved(before: npt.ArrayLike, after: npt.ArrayLike) -> float:
    """The fraction of records whose own loss is strictly lower after."""
    return float(np.mean(np.asarray(after) < np.asarray(before)))


def perplexity(loss: Estimate) -> Estimate:
    """`exp(loss)`, `inf` where that passes the largest float (a loss above 709 nats).

    The ends are transformed too: percentiles keep their rank under a monotone map.
    """
    return Estimate(_exp(loss.value), _exp(loss.low), _exp(loss.high))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
