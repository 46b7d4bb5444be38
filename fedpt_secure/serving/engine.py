"""What the server asks of whatever computes: continuations that come and go, all advanced by one token a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedpt_secure.proxy import SteeringRule

Arm = Literal["proxied", "large", "small"]
"""Whose words: the steered large LM, the large LM alone, or the tuned small LM alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One continuation, checked.

    Attributes:
        prompt: large token ids, not empty.
        arm: who answers.
        rule: how the small LM steers, for the arm `proxied`.
        first_place: place of the answer's first token in its text (`proxy.steering`).
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token.
        top_p: in (0, 1].
        seed: of the sampling: one per continuation, so that an answer does not depend on what else is computed.
        top_logprobs: how many of the most likely tokens each choice reports.
        told_apart: report what the large LM alone thinks at each place, too.
    """

    prompt: tuple[int, ...]
    arm: Arm
    rule: SteeringRule
    first_place: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_logprobs: int = 0
    told_apart: bool = False


@dataclass(frozen=True, slots=True)
class LargeAlone:
    """What the large LM alone thinks at a place whose prefix the steered one wrote.

    Attributes:
        token: its most likely token.
        token_logprob: of that token, under the large LM alone.
        chosen_logprob: of the token that was chosen, under the large LM alone.
        changed: its most likely token is not the steered model's most likely one.
    """

    token: int
    token_logprob: float
    chosen_logprob: float
    changed: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen token.

    Attributes:
        token: large token id.
        logprob: of the token, before temperature and truncation.
        top: the most likely tokens and their log-probabilities, best first, `Job.top_logprobs` of them.
        alone: where `Job.told_apart`.
        ends: the token ends the answer and is not part of it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    alone: LargeAlone | None
    ends: bool


class Engine(Protocol):
    """Rows that are admitted, advance together, and are dropped. Used by one thread at a time."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together, for every arm."""

    def admit(self, jobs: Sequence[Job]) -> list[int]:
        """Read the prompts and return a number for each row. All or none of them.

        Raises:
            FedptError: a job cannot be done.
        """

    def step(self) -> Mapping[int, Choice]:
        """The next token of every row."""

    def drop(self, row: int) -> None:
        """Forget a row and what is cached of it."""
