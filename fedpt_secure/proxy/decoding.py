"""Text from the proxied large model: one continuation of the engine's, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedpt_secure.proxy.black_box import BlackBoxLM
from fedpt_secure.proxy.continuation_row import Request
from fedpt_secure.proxy.engine import DecodingEngine
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.small_pair import SmallPair


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
        settings: how tokens are chosen; stop strings need a `DecodingEngine` with a decoder.
        sampling_rng: drawn from once per token where the temperature is not 0. The choice of a token is no secret.
        first_place: place of the first new token in its text (`Request.first_place`).

    Returns:
        An iterator over large token ids. It ends at `max_new_tokens` or at one of the vocabulary's end tokens, which is
        not yielded.

    Raises:
        ConfigError: the rule needs a small LM and there is none, or the first place is negative.
        BlackBoxError: the black box cannot do what is asked, or misbehaves.
        ModelError: the small LM's context is too short, or its vocabulary does not fit.
    """
    engine = DecodingEngine(black_box, small, largest_batch=1)
    engine.add(Request(prompt=tuple(prompt), settings=settings, first_place=first_place), sampling_rng)
    return _tokens(engine)


def _tokens(engine: DecodingEngine) -> Iterator[int]:
    try:
        while engine.handles:
            yield from (event.token for event in engine.step() if event.ending != "end")
    finally:
        engine.close()
