"""One continuation among others: what was asked, what was chosen so far, and what is told of each token."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.proxy.answer_text import AnswerText
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.speculation import DraftRates

Voice = Literal["steered", "small"]
Ending = Literal["end", "stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One continuation.

    Attributes:
        prompt: large token ids, not empty; opened by the vocabulary's separator or a chat template.
        settings: how tokens are chosen.
        first_place: place of the first new token in its text (`proxy.steering`): 0 where a response begins, else the
            number of the prompt's tokens that belong to the text being continued (the separator does not).
        voice: `steered`: the large model as the rule steers it; `small`: the tuned small LM alone, spread over the
            large vocabulary.
        top_logprobs: how many of the most likely tokens each event reports.
        told_apart: report what the large model alone thinks, too.
    """

    prompt: tuple[int, ...]
    settings: DecodingSettings
    first_place: int
    voice: Voice = "steered"
    top_logprobs: int = 0
    told_apart: bool = False


@dataclass(frozen=True, slots=True)
class LargeAlone:
    """What the large model alone thinks at a place whose prefix the steered one wrote.

    Attributes:
        token: its most likely token.
        token_logprob: of that token.
        chosen_logprob: of the token that was chosen.
        changed: its most likely token is not the steered model's.
    """

    token: int
    token_logprob: float
    chosen_logprob: float
    changed: bool


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One chosen token.

    Attributes:
        handle: whose.
        token: large token id.
        text: the text that became certain with it (`AnswerText`); empty where the engine has no decoder.
        logprob: of the token under the steered model, before penalty, temperature and truncation.
        top: the most likely tokens and their log-probabilities, best first.
        alone: where the request asks for it.
        ending: None while the continuation goes on. `end`: the token is an end token and not part of the answer;
            `stop`: a stop string; `length`: it was the last allowed one.
    """

    handle: int
    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]
    alone: LargeAlone | None
    ending: Ending | None


@dataclass(slots=True)
class EngineCounts:
    """What an engine did so far.

    Attributes:
        large_calls: calls of the large model, prompts included.
        row_calls: the same, counted once per row that the call was about.
        tokens: tokens chosen in rows that the large model was asked about.
        drafted: guessed tokens that the large model scored.
        accepted: those of them that were kept.
    """

    large_calls: int = 0
    row_calls: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Row:
    """A request under way."""

    request: Request
    sampling_rng: np.random.Generator
    answer: AnswerText | None
    tokens: list[int] = field(default_factory=list)
    """Chosen so far; the last one is not yet in the models' sessions."""
    rates: DraftRates = field(default_factory=DraftRates)

    @property
    def text(self) -> list[int]:
        """Prompt and continuation."""
        return [*self.request.prompt, *self.tokens]

    @property
    def penalised(self) -> list[int]:
        """The tokens that the repetition penalty makes less likely."""
        return self.text if self.request.settings.repetition_penalty != 1 else []

    @property
    def needs_small(self) -> bool:
        """Whether the small LM has a say in it."""
        return self.request.voice == "small" or self.request.settings.rule.needs_the_small_lm

    def take(self, handle: int, token: int, answer: Tensor, alone: Tensor | None, ends: Container[int]) -> TokenEvent:
        """Make a token part of the row, and the event of it.

        Args:
            answer: `[V]`, what the row's voice said at this place.
            alone: `[V]`, what the large model alone said, where it was asked.
            ends: tokens that end a continuation.
        """
        request = self.request
        self.tokens.append(token)
        ending: Ending | None = None
        text = ""
        if token in ends:
            ending = "end"
        else:
            text = self.answer.add(token) if self.answer else ""
            if self.answer and self.answer.stopped:
                ending = "stop"
            elif len(self.tokens) == request.settings.max_new_tokens:
                ending = "length"
        if ending is not None and self.answer:
            text += self.answer.finish()
        top = torch.topk(answer, min(request.top_logprobs, len(answer))) if request.top_logprobs else None
        return TokenEvent(
            handle=handle,
            token=token,
            text=text,
            logprob=float(answer[token]),
            top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else (),
            alone=_told_apart(alone, answer, token) if request.told_apart and alone is not None else None,
            ending=ending,
        )


def _told_apart(large: Tensor, answer: Tensor, token: int) -> LargeAlone:
    best = int(large.argmax())
    return LargeAlone(
        token=best,
        token_logprob=float(large[best]),
        chosen_logprob=float(large[token]),
        changed=int(answer.argmax()) != best,
    )
