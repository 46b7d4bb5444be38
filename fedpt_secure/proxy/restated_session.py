"""A `Session` over an API that keeps nothing: every call carries the whole text of the rows it asks about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError

NextLogprobs = Callable[[Sequence[Sequence[int]]], Tensor]
"""Texts in, the log-probabilities of each one's next token out: float32 `[texts, V]`."""

TailLogprobs = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Tensor]]
"""Texts and counts in; for each text, the log-probabilities of the token after each of its last `count` positions:
float32 `[count, V]`."""


class RestatedSession:
    """Rows are lists of ids, and one function asks about them.

    An answer about a row is asked for when it is wanted and once only, until the row changes.

    Args:
        prompts: at least one, none empty.
        ask: answers for the next token.
        ask_tail: answers for the last positions of each text in one call; None where the API cannot.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], ask: NextLogprobs, ask_tail: TailLogprobs | None = None
    ) -> None:
        self._rows = [list(prompt) for prompt in prompts]
        self._answers: list[Tensor | None] = [None] * len(prompts)
        self._ask = ask
        self._ask_tail = ask_tail
        self._drafts: list[list[int]] = []
        self._scores: list[Tensor] = []

    def logprobs(self) -> Tensor:
        unknown = [row for row, answer in enumerate(self._answers) if answer is None]
        if unknown:
            for row, answer in zip(unknown, self._ask([self._rows[row] for row in unknown]), strict=True):
                self._answers[row] = answer
        return torch.stack([answer for answer in self._answers if answer is not None])

    def append(self, ids: Sequence[int]) -> None:
        for row, token in zip(self._rows, ids, strict=True):
            row.append(token)
        self._answers = [None] * len(self._rows)

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows += [list(prompt) for prompt in prompts]
        self._answers += [None] * len(prompts)

    def select(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
        self._answers = [self._answers[row] for row in rows]

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        if self._ask_tail is None:
            raise BlackBoxError(
                "this API cannot score several tokens of a continuation in one call",
                hint="decode without speculation, one call per token",
            )
        self._drafts = [list(draft) for draft in drafts]
        texts = [row + draft for row, draft in zip(self._rows, self._drafts, strict=True)]
        self._scores = self._ask_tail(texts, [len(draft) + 1 for draft in self._drafts])
        return self._scores

    def keep(self, counts: Sequence[int]) -> None:
        for row, (draft, count) in enumerate(zip(self._drafts, counts, strict=True)):
            self._rows[row] += draft[:count]
            self._answers[row] = self._scores[row][count]
        self._drafts, self._scores = [], []
