"""The two sides of the small LM that proxy tuning subtracts: as pretrained, and tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from fedpt_secure.lm.token_map import TokenMap


class SmallSession(Protocol):
    """A batch of continuations in progress, in small token ids, in step with the large model's session.

    As there (`black_box.Session`), rows may come and go, and a row's answers do not depend on the others.
    """

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Base and tuned log-probabilities of each row's next token: float32 `[batch, v]` each."""

    def append(self, ids: Sequence[int]) -> None:
        """Extend every row by one small token."""

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """`Session.join`."""

    def select(self, rows: Sequence[int]) -> None:
        """`Session.select`."""

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """`Session.score_draft` for both sides: float32 `[len(draft) + 1, v]` twice per row."""

    def keep(self, counts: Sequence[int]) -> None:
        """`Session.keep`."""

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each row's last tokens, 0 or more. What follows is not known until each row is extended."""


class SmallPair(Protocol):
    """The small LM with and without its tuning, as distributions over the small vocabulary."""

    @property
    def token_map(self) -> TokenMap:
        """How the small vocabulary sits in the large one."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and continuation together."""

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each sequence of small ids, in order, base and tuned log-probabilities of the token after each position.

        Yields float32 `[len(sequence), v]` twice, one sequence at a time.
        """

    def start(self, prompts: Sequence[Sequence[int]]) -> SmallSession:
        """Begin one continuation per prompt of small ids."""
