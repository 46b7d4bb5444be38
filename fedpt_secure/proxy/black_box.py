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
        largest_top_k: the most tokens a truncated answer can hold; the vocabulary's size where there is no limit.
        prompt_logprobs: one call scores every position of a text; else a text of n tokens costs n calls.
        logit_bias: the API adds offsets of the caller's to the logits before it samples.
        context_length: the most tokens of prompt and continuation together.
    """

    full_vocabulary: bool
    largest_top_k: int
    prompt_logprobs: bool
    logit_bias: bool
    context_length: int


class Session(Protocol):
    """A batch of continuations in progress. Rows advance together, one token each."""

    def logprobs(self) -> Tensor:
        """Log-probabilities of each row's next token: float32 `[batch, V]`."""

    def append(self, ids: Sequence[int]) -> None:
        """Extend every row by one token, `len(ids) == batch`."""


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
        if not self.capabilities.prompt_logprobs:
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
        return _GuardedSession(
            self._inner.start(prompts), max(map(len, prompts)), len(prompts), self.capabilities, self.vocabulary
        )

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

    def _require_full_vocabulary(self, purpose: str) -> None:
        if not self.capabilities.full_vocabulary:
            raise BlackBoxError(
                f"{purpose} needs every token's log-probability;"
                f" this black box returns the {self.capabilities.largest_top_k} most likely at most",
                hint="use an API that returns the full vocabulary (a local model, llama.cpp)",
            )

    def _check_sequences(self, sequences: Sequence[Sequence[int]]) -> None:
        if not sequences:
            raise BlackBoxError("the black box was asked about no sequence at all")
        for index, sequence in enumerate(sequences):
            check_request(sequence, index, self.capabilities, self.vocabulary)


class _GuardedSession:
    def __init__(
        self, inner: Session, length: int, batch: int, capabilities: Capabilities, vocabulary: Vocabulary
    ) -> None:
        self._inner = inner
        self._length = length
        self._batch = batch
        self._capabilities = capabilities
        self._vocabulary = vocabulary

    def logprobs(self) -> Tensor:
        answer = self._inner.logprobs()
        check_logprobs(answer, rows=self._batch, vocabulary_size=self._vocabulary.size)
        return answer

    def append(self, ids: Sequence[int]) -> None:
        if len(ids) != self._batch:
            raise BlackBoxError(f"{len(ids)} tokens were appended to {self._batch} continuations")
        if self._length >= self._capabilities.context_length:
            raise BlackBoxError(
                f"the continuation would pass the black box's context of {self._capabilities.context_length} tokens",
                hint="ask for fewer new tokens or give a shorter prompt",
            )
        _check_ids(ids, self._vocabulary)
        self._inner.append(ids)
        self._length += 1


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
