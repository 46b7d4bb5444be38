"""Text from the proxied large model, one token at a time, every position computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.proxy.black_box import BlackBoxLM, GuardedBlackBox, guard
from fedpt_secure.proxy.small_pair import SmallPair
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingSettings:
    """How a continuation is chosen.

    Attributes:
        rule: how the small LM steers; where it has no say, the small LM is not run.
        max_new_tokens: where the continuation stops at the latest.
        temperature: 0 takes the most likely token; otherwise log-probabilities are divided by it before sampling.
        top_p: sample from the fewest most likely tokens whose mass (after the temperature) reaches this.

    Raises:
        ConfigError: a value is out of its range.
    """

    rule: SteeringRule
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
            ("temperature", self.temperature, "0 or a finite positive number", 0 <= self.temperature < math.inf),
            ("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
        ):
            if not holds:
                raise ConfigError(f"{name} is {value}; it must be {rule}")


def generate(
    black_box: BlackBoxLM,
    small: SmallPair | None,
    prompt: Sequence[int],
    settings: DecodingSettings,
    sampling_rng: np.random.Generator,
    *,
    first_place: int,
) -> Iterator[int]:
    """Continue a prompt with the proxied large model.

    Requests are checked before the first token is computed; tokens come as they are chosen.

    Args:
        black_box: the large model; must return the full vocabulary.
        small: base and tuned small LM; None only where the rule does not need it.
        prompt: large token ids, not empty; opened by the vocabulary's separator or a chat template.
        settings: how tokens are chosen.
        sampling_rng: drawn from once per token where the temperature is not 0. The choice of a token is no secret.
        first_place: place of the first new token in its text (`proxy.steering`): 0 where a response begins, else the
            number of the prompt's tokens that belong to the text being continued (the separator does not).

    Returns:
        An iterator over large token ids. It ends at `max_new_tokens` or at one of the vocabulary's end tokens, which is
        not yielded.

    Raises:
        ConfigError: the rule needs a small LM and there is none, or the first place is negative.
        BlackBoxError: the black box cannot do what is asked, or misbehaves.
        ModelError: the small LM's context is too short, or its vocabulary does not fit.
    """
    box = guard(black_box)
    length = len(prompt) + settings.max_new_tokens
    if length > box.capabilities.context_length:
        raise BlackBoxError(
            f"{len(prompt)} prompt tokens and {settings.max_new_tokens} new ones pass the black box's context"
            f" of {box.capabilities.context_length}",
            hint="ask for fewer new tokens or give a shorter prompt",
        )
    if first_place < 0:
        raise ConfigError(f"first_place is {first_place}; the first token of a text has place 0")
    if not settings.rule.needs_the_small_lm:
        return _continue(box, None, prompt, settings, sampling_rng, first_place)
    if small is None:
        raise ConfigError(
            f"alpha is {settings.rule.alpha}, but there is no small LM to steer by",
            hint="set alpha to 0 and leave out the shares",
        )
    if length > small.context_length:
        raise ModelError(
            f"{len(prompt)} prompt tokens and {settings.max_new_tokens} new ones pass the small LM's context"
            f" of {small.context_length}",
            hint="ask for fewer new tokens or give a shorter prompt",
        )
    return _continue(box, small, prompt, settings, sampling_rng, first_place)


def choose_token(logprobs: Tensor, settings: DecodingSettings, sampling_rng: np.random.Generator) -> int:
    """The next token from log-probabilities `[V]`; the lowest id wins a tie.

    Sampling is by one uniform draw against the cumulative distribution in float64, most likely token first.
    """
    values: npt.NDArray[np.float64] = logprobs.double().cpu().numpy()
    if settings.temperature == 0:
        return int(values.argmax())
    order = np.argsort(-values, kind="stable")
    scaled = values[order] / settings.temperature
    cumulative = np.exp(scaled - scaled[0]).cumsum()
    cumulative /= cumulative[-1]
    kept = int(np.searchsorted(cumulative, settings.top_p)) + 1
    draw = sampling_rng.random() * cumulative[kept - 1]
    # The product may round up to its bound; the bound's own token is then meant, not the one behind it.
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), kept - 1)])


def _continue(
    box: GuardedBlackBox,
    small: SmallPair | None,
    prompt: Sequence[int],
    settings: DecodingSettings,
    sampling_rng: np.random.Generator,
    first_place: int,
) -> Iterator[int]:
    large_session = box.start([prompt])
    small_session = small.start([small.token_map.to_small(prompt)]) if small else None
    for produced in range(1, settings.max_new_tokens + 1):
        logprobs = large_session.logprobs()[0]
        if small is not None and small_session is not None:
            base, tuned = (side[0].to(logprobs.device) for side in small_session.logprobs())
            place = torch.tensor(first_place + produced - 1, device=logprobs.device)
            logprobs = steered_logprobs(logprobs, base, tuned, small.token_map, settings.rule, place)
        token = choose_token(logprobs, settings, sampling_rng)
        if token in box.vocabulary.end_ids:
            return
        yield token
        if produced < settings.max_new_tokens:
            large_session.append([token])
            if small is not None and small_session is not None:
                small_session.append(small.token_map.to_small([token]))
