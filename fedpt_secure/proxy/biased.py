"""Steering a black box that shows no log-probabilities: the shift travels as the API's own `logit_bias`.

Proxy tuning adds `alpha (log p_tuned - log p_base)` to the large model's logits and samples. An API with `logit_bias`
does both by itself, one token a request; only so many tokens can be biased, and by 100 at most.

The tokens that matter are those that the shift moves *and* that anybody would say: they are chosen by
`|shift| * max(p_base, p_tuned)`. A token without a bias counts as not moved. Where the limit covers every moved token,
the result is exactly proxy tuning (a test); otherwise it is an approximation, and the API's distribution is never seen,
so what the approximation costs cannot be computed from here. A blend with the tuned small LM's own prediction needs the
large model's probabilities, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import tuning_shift
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.small_pair import SmallPair
from fedpt_secure.proxy.top_source import TopSource

LARGEST_BIAS = 100.0
"""What APIs take at most, either way."""


def shift_bias(
    base: Tensor, tuned: Tensor, token_map: TokenMap, *, alpha: float, largest_bias: int
) -> dict[int, float]:
    """The offsets of the most moved tokens, by large id, within +-`LARGEST_BIAS`.

    Args:
        base: `[v]`, the small base LM's logits or log-probabilities.
        tuned: `[v]`, the tuned small LM's.
        token_map: which large token belongs to which small class. The unknown class's shift is given to none: it would
            take an entry for each token outside the map.
        alpha: strength.
        largest_bias: how many entries.
    """
    shift = alpha * tuning_shift(base, tuned, token_map)
    weight = torch.maximum(torch.log_softmax(base.float(), -1), torch.log_softmax(tuned.float(), -1)).exp()
    moved = shift.abs() * weight
    if token_map.unknown_id is not None:
        moved[token_map.unknown_id] = 0.0
    chosen = moved.topk(min(largest_bias, moved.numel())).indices
    offsets = shift[chosen].clamp(-LARGEST_BIAS, LARGEST_BIAS).tolist()
    large = token_map.small_to_large[chosen.cpu().numpy()].tolist()
    weights = moved[chosen].tolist()
    return {token: offset for token, offset, weight in zip(large, offsets, weights, strict=True) if weight > 0}


def generate_biased(
    source: TopSource, small: SmallPair | None, prompt: Sequence[int], settings: DecodingSettings
) -> Iterator[int]:
    """Continue a prompt with a black box that is steered by its logit bias; one request a token.

    Args:
        source: the API; it samples, so a seed of ours has no say.
        small: base and tuned small LM; None only where the rule does not need it.
        prompt: large token ids, not empty.
        settings: how tokens are chosen.

    Returns:
        An iterator over large token ids, ending as `generate` does.

    Raises:
        ConfigError: the rule blends, or needs a small LM that is not there.
        BlackBoxError: the API takes no logit bias, or its context is too short, or it misbehaves.
        ModelError: the small LM's context is too short.
    """
    api = source.capabilities
    if not api.logit_bias:
        raise BlackBoxError(
            "this API takes no logit bias", hint="use an API with log-probabilities or a logit bias (llama.cpp, vLLM)"
        )
    if settings.rule.blends:
        raise ConfigError(
            "a blend with the tuned small LM needs the large LM's log-probabilities, which this API does not show",
            hint="steer by alpha alone: --shares none",
        )
    steering = settings.rule.needs_the_small_lm
    if steering and small is None:
        raise ConfigError(
            f"alpha is {settings.rule.alpha}, but there is no small LM to shift by", hint="set alpha to 0"
        )
    length = len(prompt) + settings.max_new_tokens
    for name, most, error in (
        ("black box", api.context_length, BlackBoxError),
        ("small LM", small.context_length if steering and small is not None else length, ModelError),
    ):
        if not prompt or length > most:
            raise error(
                f"{len(prompt)} prompt tokens and {settings.max_new_tokens} new ones do not fit the {name}'s context"
                f" of {most}, or there are none",
                hint="ask for fewer new tokens or give a shorter prompt",
            )
    return _continue(source, small if steering else None, list(prompt), settings)


def _continue(source: TopSource, small: SmallPair | None, text: list[int], settings: DecodingSettings) -> Iterator[int]:
    session = small.start([small.token_map.to_small(text)]) if small is not None else None
    for produced in range(1, settings.max_new_tokens + 1):
        bias: dict[int, float] = {}
        if small is not None and session is not None:
            base, tuned = (side[0] for side in session.logprobs())
            bias = shift_bias(
                base,
                tuned,
                small.token_map,
                alpha=settings.rule.alpha,
                largest_bias=source.capabilities.largest_bias,
            )
        token = source.biased_token(text, bias, temperature=settings.temperature, top_p=settings.top_p)
        if token in source.vocabulary.end_ids:
            return
        yield token
        text.append(token)
        if small is not None and session is not None and produced < settings.max_new_tokens:
            session.append(small.token_map.to_small([token]))
