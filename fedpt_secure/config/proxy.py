"""How the tuned small LM steers the large one: in a run, in its evaluation, and in `generate`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from fedpt_secure.config.settings import Count, Positive, Seed, Settings

Alpha = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Shares = tuple[tuple[int, float], ...]
"""`(from_place, share)` with ascending places: how much the tuned small LM's own prediction counts from there on."""

TEXT_SHARES: Shares = ((0, 0.95), (1, 0.5), (2, 0.7), (4, 0.6), (8, 0.25))
RESPONSE_SHARES: Shares = ((0, 0.5), (1, 0.3), (2, 0.15), (4, 0.2), (16, 0.15), (32, 0.1), (64, 0.05))
"""How much of a steered prediction is the tuned small LM's own, by place; chosen on public text only (docs/LOG.md)."""


def require_shares(shares: Shares) -> Shares:
    """Accept the places and shares of a steering rule (`proxy.steering`), unchanged.

    Raises:
        ValueError: a share is not a number from 0 to 1, or the places do not ascend from 0 or later.
    """
    places = [place for place, _ in shares]
    if any(place < 0 for place in places) or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"places must ascend, the first at least 0; given {places}")
    if wrong := [share for _, share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1; given {wrong[0]:g}")
    return shares


_Share = Annotated[tuple[Annotated[int, Field(strict=True)], Annotated[float, Field(strict=True)]], Field(strict=False)]
_Shares = Annotated[tuple[_Share, ...], Field(strict=False), AfterValidator(require_shares)]


class ProxyConfig(Settings):
    """How the tuned small LM steers the black box, and FedPT's distillation between rounds."""

    alpha: Alpha = 0.5
    """Weight of the small LM's shift; the default was chosen on public text only (docs/LOG.md)."""
    shares: _Shares = TEXT_SHARES
    """Pairs `[from_place, share]`: from that place of a record's text on, the tuned small LM's own prediction has this
    share of the steered one (`proxy.steering`). Public constants, like alpha."""
    response_shares: _Shares = RESPONSE_SHARES
    """The same for responses to a prompt, which the large model has read, so that it needs the small one less."""
    distill_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of distillation on public text after each round; 0 switches it off."""
    distill_learning_rate: Positive = 1e-3
    distill_temperature: Positive = 1.0
    """Softens teacher and student while distilling."""
    distill_top_k: Count = 128
    """Classes of the black box's answers that are kept a position; the others share what is left."""


class EvaluationConfig(Settings):
    """The held-out report. It chooses nothing."""

    records: Annotated[int, Field(ge=10, le=1_000_000)] = 300
    """Held-out records scored by all four arms (a seeded sample)."""
    bootstrap_samples: Annotated[int, Field(ge=200)] = 2000


class GenerateConfig(Settings):
    """What `generate` is asked for."""

    prompt: str
    alpha: Alpha | None = None
    """Weight of the small LM's shift; nothing for the run's."""
    shares: _Shares | None = None
    """The tuned small LM's own share by place; nothing for the run's, an empty list for none."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 48
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest most likely tokens with this mass."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many most likely tokens; 0 for all."""
    repetition_penalty: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = 1.0
    """Factor on the log-probabilities of tokens that were there before."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16, strict=False)] = ()
    """Strings that end the continuation, which does not hold them."""
    speculate: bool = False
    """Guess several tokens per call of the large LM; the output's distribution stays the same."""
    seed: Seed = 0
    """Of the sampling; the choice of a token is no secret."""

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < 1e-3:
            raise ValueError("temperature must be 0 or from 0.001 to 100")
        return value
