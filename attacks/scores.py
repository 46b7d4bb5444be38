"""Membership scores of one record, from what a view tells about its tokens. Higher: more likely a member.

With log p_t the view's log-probability of token t and D_t = log p_t - log reference_t, the reference being what the
model said before it was tuned (everybody has it):

| score | formula | source |
| --- | --- | --- |
| `ratio` | mean D_t | Carlini et al. 2021 (reference model); the headline, for it removes what makes a text easy |
| `loss` | mean log p_t | Yeom et al. 2018 |
| `zlib` | sum log p_t over the bytes of the compressed text | Carlini et al. 2021 |
| `min_k` | mean of the lowest 20 % of log p_t | Shi et al. 2024, Min-K% Prob |
| `min_k_plus` | the same of (log p_t - mu_t) / sigma_t, moments of log p under p | Zhang et al. 2024, Min-K%++ |
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

HEADLINE = "ratio"
LOWEST = 0.2
"""Share of a record's tokens that Min-K% looks at."""
_SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True, slots=True)
class RecordSignals:
    """What a view tells about one record, token by token.

    Attributes:
        log_p: log-probability of each judged token, `[tokens]`; what stands in for it, where a view gives less.
        log_reference: the same before tuning.
        mean, deviation: moments of log p(.) under p at each token; None where the view does not give them.
        text: the record, which the attacker has.
    """

    log_p: FloatArray
    log_reference: FloatArray
    text: str
    mean: FloatArray | None = None
    deviation: FloatArray | None = None


def ratio(record: RecordSignals) -> float:
    """Mean gain over the reference."""
    return float((record.log_p - record.log_reference).mean())


def loss(record: RecordSignals) -> float:
    """Mean log-probability."""
    return float(record.log_p.mean())


def zlib_ratio(record: RecordSignals) -> float:
    """Log-probability over the compressed length."""
    return float(record.log_p.sum() / len(zlib.compress(record.text.encode())))


def min_k(record: RecordSignals) -> float:
    """Mean of the lowest fifth."""
    return _lowest(record.log_p)


def min_k_plus(record: RecordSignals) -> float:
    """Mean of the lowest fifth, standardised. Assumes that the view gives moments."""
    if record.mean is None or record.deviation is None:
        raise ValueError("this view gives no moments")
    return _lowest((record.log_p - record.mean) / np.maximum(record.deviation, _SMALLEST_DEVIATION))


def _lowest(values: FloatArray) -> float:
    count = max(1, round(LOWEST * len(values)))
    return float(np.sort(values)[:count].mean())


SCORES: Mapping[str, Callable[[RecordSignals], float]] = {
    "ratio": ratio,
    "loss": loss,
    "zlib": zlib_ratio,
    "min_k": min_k,
    "min_k_plus": min_k_plus,
}
TOKEN_SCORES = ("ratio", "loss")
"""Scores that make sense where a view only tells whether a token was the answer."""
MOMENT_FREE_SCORES = ("ratio", "loss", "zlib", "min_k")
