"""What the adapters of remote APIs have in common: texts in, the most likely next tokens out.

A `TopSource` speaks one API. `RemoteLM` makes a `BlackBoxLM` of one whose answers hold every token; `CompletedLM`
(`proxy/completed.py`) of one whose answers are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.black_box import Capabilities, Session
from fedpt_secure.proxy.http_transport import ApiUsage
from fedpt_secure.proxy.restated_session import RestatedSession
from fedpt_secure.proxy.top_logprobs import TopLogprobs, dense


class TopSource(Protocol):
    """An API that answers with the most likely tokens. Every method may raise `BlackBoxError`."""

    @property
    def capabilities(self) -> Capabilities:
        """What the API can do."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""

    @property
    def texts_at_once(self) -> int:
        """How many texts are best asked about side by side; more would only wait at the server."""

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""

    def next_tokens(self, texts: Sequence[Sequence[int]], top_k: int) -> list[TopLogprobs]:
        """The `top_k` most likely tokens after each text; one call for `largest_batch` texts."""

    def last_positions(self, text: Sequence[int], count: int, top_k: int) -> list[TopLogprobs]:
        """The most likely tokens after each of a text's last `count` positions, in order.

        One call where `prompt_logprobs`; else the API computes each position anew.
        """

    def token_scores(self, text: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """The log-probabilities of some tokens after a text; only where `token_scores`."""

    def biased_token(self, text: Sequence[int], bias: dict[int, float], *, temperature: float, top_p: float) -> int:
        """The token that the API chooses after a text with offsets added to some logits; only where `logit_bias`."""

    def close(self) -> None:
        """Close connections."""


class RemoteLM:
    """`BlackBoxLM` over an API whose answers hold the whole vocabulary.

    Args:
        source: the API. Behind `guard`, one with truncated answers is refused with the alternative.
    """

    def __init__(self, source: TopSource) -> None:
        self._source = source

    @property
    def capabilities(self) -> Capabilities:
        """The API's."""
        return self._source.capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """The API's."""
        return self._source.vocabulary

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""
        return self._source.usage

    def close(self) -> None:
        """Close connections."""
        self._source.close()

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """`BlackBoxLM.score`."""
        for sequence in sequences:
            yield self._tail(sequence, len(sequence))

    def start(self, prompts: Sequence[Sequence[int]]) -> Session:
        """`BlackBoxLM.start`; the API keeps nothing for us, so every call carries the whole text."""
        draft_scoring = self.capabilities.draft_scoring
        return RestatedSession(prompts, self._next, self._tails if draft_scoring else None)

    def _next(self, texts: Sequence[Sequence[int]]) -> Tensor:
        size = self.vocabulary.size
        return torch.stack([dense(top, size) for top in self._source.next_tokens(texts, size)])

    def _tail(self, text: Sequence[int], count: int) -> Tensor:
        size = self.vocabulary.size
        return torch.stack([dense(top, size) for top in self._source.last_positions(text, count, size)])

    def _tails(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
        return [self._tail(text, count) for text, count in zip(texts, counts, strict=True)]
