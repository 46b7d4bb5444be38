"""Speculative decoding: guesses of several tokens, and the rule that keeps the output's distribution unchanged.

A *draft* guesses how the continuation goes on; the large model scores all of it in one call. Draft token `x` at a place
where the draft's distribution is `q` and the steered one `p` is accepted with probability `min(1, p(x) / q(x))`; at the
first refusal a token is drawn from `max(p - q, 0)`, normalised, and if none is refused one more from `p` behind the
draft (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). What comes out is distributed by `p` whatever `q` is; a
better guess only takes fewer calls. Here `p` is the *proxied* distribution with penalty, temperature and truncation.

Two sources of drafts, both free of calls to the large model:

- *lookup*: where the last tokens stood before in this row's own prompt or continuation, what followed there (prompt
  lookup decoding, Saxena 2023). Other rows are not searched: how fast an answer comes would tell what others wrote.
- *small*: the tuned small LM, which steers at the same places anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpt_secure.errors import ConfigError
from fedpt_secure.proxy.sampling import Distribution, draw

_FORGETTING = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How much is guessed.

    Attributes:
        longest: most tokens of a draft.
        lookup: guess from the row's own text.
        small: guess by the tuned small LM.
        shortest_match: tokens that must agree before a lookup.
        lookup_cost: what scoring one more token costs the large model, as a share of a call.
        small_cost: the same with the small LM's work for the guess.

    Raises:
        ConfigError: a value is out of its range.
    """

    longest: int = 8
    lookup: bool = True
    small: bool = True
    shortest_match: int = 2
    lookup_cost: float = 0.05
    small_cost: float = 0.15

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("longest", self.longest, "from 1 to 64", 1 <= self.longest <= 64),
            ("shortest_match", self.shortest_match, "at least 1", self.shortest_match >= 1),
            ("lookup_cost", self.lookup_cost, "at least 0", self.lookup_cost >= 0),
            ("small_cost", self.small_cost, "at least 0", self.small_cost >= 0),
        ):
            if not holds:
                raise ConfigError(f"speculation: {name} is {value}; it must be {rule}")


@dataclass(slots=True)
class AcceptanceRate:
    """How often a source's guesses were accepted lately, and how long a draft pays at that rate."""

    accepted: float = 0.6
    examined: float = 1.0

    def update(self, *, accepted: int, examined: int) -> None:
        """Count the guesses of one draft; `examined` are those before and at the first refusal."""
        self.accepted = _FORGETTING * self.accepted + accepted
        self.examined = _FORGETTING * self.examined + examined

    def best_length(self, longest: int, cost: float) -> int:
        """The length with most tokens per cost: `(1 - a^(n+1)) / (1 - a)` tokens are expected for `1 + cost n`.

        At least 1, so that the rate goes on being measured (Leviathan et al. 2023, section 3.3).
        """
        rate = min(self.accepted / self.examined, 0.999)
        pays = [(1 - rate ** (n + 1)) / (1 - rate) / (1 + cost * n) for n in range(1, longest + 1)]
        return 1 + int(np.argmax(pays))


@dataclass(slots=True)
class DraftRates:
    """A row's acceptance rates, by source. They depend on the row's own history alone."""

    lookup: AcceptanceRate = field(default_factory=AcceptanceRate)
    small: AcceptanceRate = field(default_factory=AcceptanceRate)


def look_up(text: Sequence[int], *, longest: int, shortest_match: int, longest_match: int = 6) -> list[int]:
    """What followed the latest earlier place that agrees with the end of the text in the most tokens.

    The guess is read on into the end of the text where it reaches it, so that a loop is guessed as a loop.

    Returns:
        Up to `longest` tokens; none where fewer than `shortest_match` tokens agree.
    """
    size = len(text)
    for match in range(min(longest_match, size - 1), shortest_match - 1, -1):
        ending = list(text[size - match :])
        for start in range(size - match - 1, -1, -1):
            if text[start + match - 1] == ending[-1] and list(text[start : start + match]) == ending:
                period = size - match - start
                return [text[size - period + place % period] for place in range(longest)]
    return []


def accept(
    target: Distribution, token: int, guessed_by: Distribution, sampling_rng: np.random.Generator
) -> tuple[bool, int]:
    """Whether a draft token is kept, and the token that stands in its place.

    Args:
        target: the distribution to follow.
        token: the guess, drawn from `guessed_by`.
        guessed_by: the draft's distribution at this place.
        sampling_rng: drawn from once or twice; not at all where the target is one token.
    """
    if len(target.ids) == 1:
        return token == int(target.ids[0]), int(target.ids[0])
    if sampling_rng.random() * guessed_by.of(token) < target.of(token):
        return True, token
    return False, draw(residual(target, guessed_by), sampling_rng)


def residual(target: Distribution, guessed_by: Distribution) -> Distribution:
    """`max(p - q, 0)`, normalised: what a refused guess is replaced from."""
    left = target.probabilities.copy()
    places = np.searchsorted(target.ids, guessed_by.ids)
    inside = places < len(target.ids)
    inside[inside] = target.ids[places[inside]] == guessed_by.ids[inside]
    left[places[inside]] -= guessed_by.probabilities[inside]
    keep = left > 0
    if not keep.any():
        # Only by rounding, where p and q are the same and nothing should have been refused.
        return target
    return Distribution(target.ids[keep], left[keep] / left[keep].sum())
