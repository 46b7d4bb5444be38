"""The large language model as its owner lets it be seen: token ids in, log-probabilities out.

Weights, gradients and hidden states are not in the interface, so nothing above it can come to depend on them. What an
API can do differs; each adapter states it in `Capabilities`, and `guard` turns a request beyond that into a
`BlackBoxError` that names the alternative. `guard` also checks every answer: a black box is somebody else's program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError
from fedpt_secure.lm.vocabulary import Vocabulary

NORMALISATION_TOLERANCE = 1e-3
"""How far, in nats, the log of a distribution's total mass may lie from 0: room for an API that rounds to 4 digits."""

# Small enough that the temporaries stay in cache and are reused; buffers of 128 rows cost 2-3 times as much on a CPU.
_ROWS_CHECKED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a black box can answer.

    Attributes:
        full_vocabulary: answers hold the log-probability of every token.
        largest_top_k: the most tokens a truncated answer can hold; the vocabulary's size where there is no limit, 0
            where the API gives no log-probabilities.
        prompt_logprobs: one call scores every position of a text; else a text of n tokens costs n calls.
        logit_bias: the API adds offsets of the caller's to the logits before it samples.
        context_length: the most tokens of prompt and continuation together.
        draft_scoring: a session scores several tokens a row in one call (`Session.score_draft`).
        remote: answers come from another process or machine, so that waiting for them leaves this one free.
        leaves_this_machine: texts are sent to another machine.
        stepwise_scoring: texts are scored all the same where `prompt_logprobs` is false, at that price.
        largest_batch: the most texts a session may hold; None for no limit, 1 where there is no batching.
        largest_bias: how many tokens a logit bias may name.
        token_scores: the API says how likely a token of the caller's choice is.
        exact_tokens: how many tokens of an answer are the API's own; the others are filled in (`proxy/completed.py`).
            None where all are.
    """

    full_vocabulary: bool
    largest_top_k: int
    prompt_logprobs: bool
    logit_bias: bool
    context_length: int
    draft_scoring: bool = False
    remote: bool = False
    leaves_this_machine: bool = False
    stepwise_scoring: bool = False
    largest_batch: int | None = None
    largest_bias: int = 0
    token_scores: bool = False
    exact_tokens: int | None = None


class Session(Protocol):
    """A batch of continuations in progress, one row each. Rows may come and go; the order of the others stays.

    A row's answers do not depend on the other rows, beyond rounding. `restated_session.RestatedSession` is a ready
    implementation for an API without state.
    """

    def logprobs(self) -> Tensor:
        """Log-probabilities of each row's next token: float32 `[batch, V]`."""

    def append(self, ids: Sequence[int]) -> None:
        """Extend every row by one token, `len(ids) == batch`."""

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Add a row per prompt, none empty, behind the present ones."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, at least one, each named once, in this order; forget the others."""

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Score a continuation of each row without deciding on it: one call, whatever the lengths (0 is allowed).

        Returns, for each row, float32 `[len(draft) + 1, V]`: the log-probabilities of the token at the place of each
        draft token, then of the token behind the draft. `keep` must be the next call. Only where
        `Capabilities.draft_scoring`.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """After `score_draft`: make the first `counts[row]` draft tokens of each row part of it; drop the others."""


@runtime_checkable
class BlackBoxLM(Protocol):
    """A language model that is asked, never opened."""

    @property
    def capabilities(self) -> Capabilities:
        """What may be asked."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean; answers have exactly `vocabulary.size` columns."""

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """For each sequence, in order, the log-probabilities of the token *after* each of its positions.

        Yields float32 `[len(sequence), V]`, one sequence at a time, so that memory is bounded by one batch; a reader
        reduces each answer before it takes the next. Sequences of similar length are best put next to each other.
        """

    def start(self, prompts: Sequence[Sequence[int]]) -> Session:
        """Begin one continuation per prompt; prompts may differ in length and are not empty."""


class GuardedBlackBox:
    """A black box whose requests are checked against its capabilities and whose answers are checked for sense.

    Guarantees: every tensor that comes out has the promised shape and dtype, no NaN and no +inf (-inf is allowed: an
    excluded token), and each row's total mass is 1 within `NORMALISATION_TOLERANCE`; as many answers as sequences.

    Raises (from every method):
        BlackBoxError: a request beyond the capabilities, or an answer that breaks the guarantee.
    """

    def __init__(self, inner: BlackBoxLM) -> None:
        self._inner = inner

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        return self._inner.vocabulary

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """`BlackBoxLM.score`, checked."""
        self._require_full_vocabulary("scoring a text")
        if not (self.capabilities.prompt_logprobs or self.capabilities.stepwise_scoring):
            raise BlackBoxError(
                "this black box cannot score the positions of a given text",
                hint="use an API with prompt log-probabilities, or `start` and `append`, one call per token",
            )
        self._check_sequences(sequences)
        return self._checked_scores(sequences)

    def start(self, prompts: Sequence[Sequence[int]]) -> Session:
        """`BlackBoxLM.start`, checked."""
        self._require_full_vocabulary("decoding")
        self._check_sequences(prompts)
        self._require_batch(len(prompts))
        return _GuardedSession(self._inner.start(prompts), list(map(len, prompts)), self)

    def _checked_scores(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        answers = iter(self._inner.score(sequences))
        for index, sequence in enumerate(sequences):
            answer = next(answers, None)
            if answer is None:
                raise BlackBoxError(f"the black box answered {index} of {len(sequences)} sequences")
            check_logprobs(answer, rows=len(sequence), vocabulary_size=self.vocabulary.size)
            yield answer
        if next(answers, None) is not None:
            raise BlackBoxError(f"the black box gave more answers than the {len(sequences)} sequences asked about")

    def _require_batch(self, rows: int) -> None:
        most = self.capabilities.largest_batch
        if most is not None and rows > most:
            raise BlackBoxError(
                f"{rows} continuations were asked for at once; this black box takes {most}",
                hint="start one session after the other",
            )

    def _require_full_vocabulary(self, purpose: str) -> None:
        if self.capabilities.largest_top_k == 0:
            raise BlackBoxError(
                f"{purpose} needs log-probabilities; this black box returns none",
                hint="`generate_biased` steers it by its logit bias"
                if self.capabilities.logit_bias
                else "use an API that returns log-probabilities (a local model, llama.cpp, vLLM)",
            )
        if not self.capabilities.full_vocabulary:
            raise BlackBoxError(
                f"{purpose} needs every token's log-probability;"
                f" this black box returns the {self.capabilities.largest_top_k} most likely at most",
                hint="use an API that returns the full vocabulary (a local model, llama.cpp), or fill the rest in by"
                " the small LM's shape (`CompletedLM`)",
            )

    def _check_sequences(self, sequences: Sequence[Sequence[int]]) -> None:
        if not sequences:
            raise BlackBoxError("the black box was asked about no sequence at all")
        for index, sequence in enumerate(sequences):
            check_request(sequence, index, self.capabilities, self.vocabulary)


class _GuardedSession:
    """A session whose requests and answers are checked; `lengths` counts the tokens of each row."""

    def __init__(self, inner: Session, lengths: list[int], box: GuardedBlackBox) -> None:
        self._inner = inner
        self._lengths = lengths
        self._box = box
        self._draft: list[int] | None = None

    def logprobs(self) -> Tensor:
        self._require_no_draft()
        answer = self._inner.logprobs()
        check_logprobs(answer, rows=len(self._lengths), vocabulary_size=self._box.vocabulary.size)
        return answer

    def append(self, ids: Sequence[int]) -> None:
        self._require_no_draft()
        self._require_a_value_per_row(len(ids), "tokens")
        self._require_room([1] * len(ids))
        _check_ids(ids, self._box.vocabulary)
        self._inner.append(ids)
        self._lengths = [length + 1 for length in self._lengths]

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._require_no_draft()
        self._box._check_sequences(prompts)
        self._box._require_batch(len(self._lengths) + len(prompts))
        self._inner.join(prompts)
        self._lengths += map(len, prompts)

    def select(self, rows: Sequence[int]) -> None:
        self._require_no_draft()
        if not rows or len(set(rows)) != len(rows) or not all(0 <= row < len(self._lengths) for row in rows):
            raise BlackBoxError(f"rows {list(rows)} are not some of the {len(self._lengths)} continuations, each once")
        self._inner.select(rows)
        self._lengths = [self._lengths[row] for row in rows]

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        self._require_no_draft()
        if not self._box.capabilities.draft_scoring:
            raise BlackBoxError(
                "this black box cannot score several tokens of a continuation in one call",
                hint="decode without speculation, one call per token",
            )
        self._require_a_value_per_row(len(drafts), "drafts")
        self._require_room(list(map(len, drafts)))
        for draft in drafts:
            _check_ids(draft, self._box.vocabulary)
        answers = self._inner.score_draft(drafts)
        if len(answers) != len(drafts):
            raise BlackBoxError(f"the black box scored {len(answers)} of {len(drafts)} drafts")
        for draft, answer in zip(drafts, answers, strict=True):
            check_logprobs(answer, rows=len(draft) + 1, vocabulary_size=self._box.vocabulary.size)
        self._draft = list(map(len, drafts))
        return answers

    def keep(self, counts: Sequence[int]) -> None:
        if self._draft is None:
            raise BlackBoxError("there is no scored draft to keep tokens of")
        self._require_a_value_per_row(len(counts), "counts")
        if not all(0 <= count <= length for count, length in zip(counts, self._draft, strict=True)):
            raise BlackBoxError(f"{list(counts)} tokens cannot be kept of drafts of {self._draft}")
        self._inner.keep(counts)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        self._draft = None

    def _require_no_draft(self) -> None:
        if self._draft is not None:
            raise BlackBoxError("a draft was scored and nothing said about it", hint="call `keep` first")

    def _require_a_value_per_row(self, given: int, what: str) -> None:
        if given != len(self._lengths):
            raise BlackBoxError(f"{given} {what} were given for {len(self._lengths)} continuations")

    def _require_room(self, added: Sequence[int]) -> None:
        most = self._box.capabilities.context_length
        if any(length + more > most for length, more in zip(self._lengths, added, strict=True)):
            raise BlackBoxError(
                f"the continuation would pass the black box's context of {most} tokens",
                hint="ask for fewer new tokens or give a shorter prompt",
            )


def guard(black_box: BlackBoxLM) -> GuardedBlackBox:
    """The black box behind checks; one that is guarded already comes back as it is."""
    return black_box if isinstance(black_box, GuardedBlackBox) else GuardedBlackBox(black_box)


def check_request(sequence: Sequence[int], index: int, capabilities: Capabilities, vocabulary: Vocabulary) -> None:
    """Return if a sequence can be sent.

    Raises:
        BlackBoxError: it is empty, longer than the context, or holds an id that is not in the vocabulary.
    """
    if not sequence:
        raise BlackBoxError(
            f"sequence {index} is empty", hint="open every sequence with the vocabulary's separator token"
        )
    if len(sequence) > capabilities.context_length:
        raise BlackBoxError(
            f"sequence {index} has {len(sequence)} tokens; the black box takes {capabilities.context_length}",
            hint="cut the text to a shorter context length",
        )
    _check_ids(sequence, vocabulary)


def check_logprobs(answer: Tensor, *, rows: int, vocabulary_size: int) -> None:
    """Return if `answer` is `rows` log-distributions over the vocabulary.

    Raises:
        BlackBoxError: the shape or dtype is wrong, a value is NaN or +inf, or a row's mass is not 1.
    """
    if not isinstance(answer, Tensor) or tuple(answer.shape) != (rows, vocabulary_size):
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise BlackBoxError(f"the black box answered with {shape} where ({rows}, {vocabulary_size}) was asked")
    if answer.dtype not in (torch.float32, torch.float64):
        raise BlackBoxError(f"the black box answered in {answer.dtype}; log-probabilities come in float32")
    # One pass finds everything: a NaN or +inf anywhere, or a row of -inf, makes the total mass NaN or infinite.
    for first in range(0, rows, _ROWS_CHECKED_AT_ONCE):
        log_mass = torch.logsumexp(answer[first : first + _ROWS_CHECKED_AT_ONCE], dim=-1)
        wrong = torch.nonzero(~(log_mass.abs() <= NORMALISATION_TOLERANCE))
        if wrong.numel():
            position = int(wrong[0])
            raise BlackBoxError(
                f"the black box's answer at position {first + position} is not a distribution:"
                f" the log of its total mass is {float(log_mass[position]):.4g}, not 0",
                hint="the model's weights are damaged, or the API returns logits instead of log-probabilities",
            )


def _check_ids(ids: Sequence[int], vocabulary: Vocabulary) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocabulary.size:
            raise BlackBoxError(
                f"token id {token_id} is not one of the black box's {vocabulary.size} tokens",
                hint="cut the text with the black box's own tokenizer",
            )
