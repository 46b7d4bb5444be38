"""A `Session` over an API that keeps nothing: every call carries the whole text of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fedpt_secure.errors import BlackBoxError

NextLogprobs = Callable[[Sequence[Sequence[int]]], Tensor]
"""Texts in, the log-probabilities of each one's next token out: float32 `[texts, V]`."""

TailLogprobs = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Tensor]]
"""Texts and counts in; for each text, the log-probabilities of the token after each of its last `count` positions:
float32 `[count, V]`."""


class RestatedSession:
    """Rows are lists of ids, and one function asks about them.

    An answer is asked for when it is wanted and once only, whatever is asked again before a row changes.

    Args:
        prompts: at least one, none empty.
        ask: answers for the next token.
        ask_tail: answers for the last positions of each text in one call; None where the API cannot.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], ask: NextLogprobs, ask_tail: TailLogprobs | None = None
    ) -> None:
        self._rows = [list(prompt) for prompt in prompts]
        self._ask = ask
        self._ask_tail = ask_tail
        self._answer: Tensor | None = None
        self._drafts: list[list[int]] = []

    def logprobs(self) -> Tensor:
        if self._answer is None:
            self._answer = self._ask(self._rows)
        return self._answer

    def append(self, ids: Sequence[int]) -> None:
        for row, token in zip(self._rows, ids, strict=True):
            row.append(token)
        self._answer = None

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows += [list(prompt) for prompt in prompts]
        self._answer = None

    def select(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
        self._answer = self._answer[list(rows)] if self._answer is not None else None

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        if self._ask_tail is None:
            raise BlackBoxError(
                "this API cannot score several tokens of a continuation in one call",
                hint="decode without speculation, one call per token",
            )
        self._drafts = [list(draft) for draft in drafts]
        texts = [row + draft for row, draft in zip(self._rows, self._drafts, strict=True)]
        return self._ask_tail(texts, [len(draft) + 1 for draft in self._drafts])

    def keep(self, counts: Sequence[int]) -> None:
        for row, draft, count in zip(self._rows, self._drafts, counts, strict=True):
            row += draft[:count]
        self._drafts = []
        self._answer = None
