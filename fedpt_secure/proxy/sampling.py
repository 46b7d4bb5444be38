"""How the next token is chosen from its distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedpt_secure.errors import ConfigError
from fedpt_secure.proxy.steering import SteeringRule

# Most truncated distributions end within so many tokens, so that the whole vocabulary need not be sorted.
_SORTED_AT_FIRST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingSettings:
    """How a continuation is chosen: penalty, temperature, `top_k`, `top_p`, in this order.

    Attributes:
        rule: how the small LM steers; where it has no say, the small LM is not run.
        max_new_tokens: where the continuation stops at the latest.
        temperature: 0 takes the most likely token; otherwise log-probabilities are divided by it before sampling.
        top_p: sample from the fewest most likely tokens whose mass (after the temperature) reaches this.
        top_k: sample from the `top_k` most likely tokens; 0 for all.
        repetition_penalty: log-probabilities of tokens that stand in the prompt or the continuation are multiplied by
            it: 1 changes nothing, more makes them less likely (CTRL, Keskar et al. 2019, arXiv 1909.05858, with
            log-probabilities for logits, because a black box's logits are known up to a constant only).
        stop: strings that end the continuation; the text ends before the first of them.
        seed: of this continuation's own random numbers. The choice of a token is no secret.

    Raises:
        ConfigError: a value is out of its range.
    """

    rule: SteeringRule
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
            ("temperature", self.temperature, "0 or a finite positive number", 0 <= self.temperature < math.inf),
            ("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", self.top_k, "at least 0", self.top_k >= 0),
            ("repetition_penalty", self.repetition_penalty, "from 1 to 10", 1 <= self.repetition_penalty <= 10),
            ("stop", self.stop, "strings with a character in each", all(self.stop)),
            ("seed", self.seed, "at least 0", self.seed >= 0),
        ):
            if not holds:
                raise ConfigError(f"{name} is {value!r}; it must be {rule}")


class Distribution(NamedTuple):
    """Tokens that may be chosen, ascending, and their probabilities: int64 and float64 `[n]`, positive, sum 1."""

    ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    def of(self, token: int) -> float:
        """The probability of a token."""
        place = int(np.searchsorted(self.ids, token))
        return float(self.probabilities[place]) if place < len(self.ids) and self.ids[place] == token else 0.0


def point(token: int) -> Distribution:
    """The distribution of a token that is certain."""
    return Distribution(np.array([token]), np.array([1.0]))


def shaped(logprobs: Tensor, settings: DecodingSettings, seen: Sequence[int]) -> Distribution:
    """What the settings make of log-probabilities `[V]`; at temperature 0 the most likely token, the lower id in a tie.

    Args:
        seen: tokens of the prompt and the continuation, for the penalty; each may be named more than once.
    """
    values: npt.NDArray[np.float64] = logprobs.double().cpu().numpy()
    if settings.repetition_penalty != 1 and seen:
        values = values.copy()
        places = np.unique(np.asarray(seen, dtype=np.int64))
        values[places] *= settings.repetition_penalty
    if settings.temperature == 0:
        return point(int(values.argmax()))
    weights = np.exp((values - values.max()) / settings.temperature)
    ids = _kept(values, weights, settings)
    weights = weights[ids]
    positive = weights > 0
    ids, weights = ids[positive], weights[positive]
    return Distribution(ids, weights / weights.sum())


def draw(distribution: Distribution, sampling_rng: np.random.Generator) -> int:
    """One token, by one uniform number; none where it is certain."""
    if len(distribution.ids) == 1:
        return int(distribution.ids[0])
    cumulative = distribution.probabilities.cumsum()
    place = int(np.searchsorted(cumulative, sampling_rng.random() * cumulative[-1], side="right"))
    # The product may round up to its bound; the last token is then meant, not the one behind it.
    return int(distribution.ids[min(place, len(cumulative) - 1)])


def choose_token(
    logprobs: Tensor, settings: DecodingSettings, sampling_rng: np.random.Generator, seen: Sequence[int] = ()
) -> int:
    """The next token from log-probabilities `[V]`: `draw` of `shaped`."""
    return draw(shaped(logprobs, settings, seen), sampling_rng)


def _kept(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], settings: DecodingSettings
) -> npt.NDArray[np.int64]:
    """The ids that survive `top_k` and `top_p`, ascending."""
    count = min(settings.top_k or len(values), len(values))
    if count == len(values) and settings.top_p == 1:
        return np.arange(len(values))
    total = weights.sum() if count == len(values) else None
    for width in (min(max(settings.top_k, _SORTED_AT_FIRST), len(values)), len(values)):
        order = _most_likely(values, width)[:count]
        cumulative = weights[order].cumsum()
        mass = settings.top_p * (cumulative[-1] if total is None else total)
        if settings.top_p == 1 or width == len(values) or cumulative[-1] >= mass:
            break
    kept = len(order) if settings.top_p == 1 else int(np.searchsorted(cumulative, mass)) + 1
    return np.sort(order[:kept])


def _most_likely(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """At least `count` ids, most likely first, the lower id first in a tie."""
    if count == len(values):
        return np.argsort(-values, kind="stable")
    bound = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.argsort(-values[candidates], kind="stable")]
