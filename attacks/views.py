"""What an adversary has in front of it. Each view is a type of its own, and an attack takes the view and nothing else.

- `ReleasedAdapter`: the small LM, before and after tuning, and the adapter's numbers. Everybody who downloads it.
- An endpoint's `Answer`: what the proxy-tuned large LM says after each token of a text, as all log-probabilities, as
  the k most likely, or as the one token it would choose. Behind it lie the adapter and the large LM, out of reach: an
  answer is made by `restrict` from the served distribution, and holds nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpt_secure.attacks.scores import RecordSignals
from fedpt_secure.data import Example, Record

TOP_K = 20
"""Answers of a top-k endpoint: what OpenAI-compatible APIs give at most."""
FORMS = ("full", "top_k", "token")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record that an attacker asks about, and its token ids in the large vocabulary."""

    record: Record
    example: Example


class ReleasedAdapter(Protocol):
    """The view of whoever holds the adapter."""

    def signals(self, candidates: Sequence[Candidate]) -> Iterator[RecordSignals]:
        """Token log-probabilities of the tuned small LM, and of the one before, candidate by candidate."""


@dataclass(frozen=True, slots=True)
class FullAnswer:
    """Log-probabilities of all tokens after each position: `[positions, V]`."""

    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class TopKAnswer:
    """The k most likely tokens after each position, and their log-probabilities: `[positions, k]` each."""

    ids: Tensor
    logprobs: Tensor
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """The token that greedy decoding would give after each position: `[positions]`."""

    ids: Tensor


Answer = FullAnswer | TopKAnswer | TokenAnswer


class Endpoint(Protocol):
    """The view of whoever may ask the proxy-tuned model, and the public large model beside it."""

    def answers(self, candidates: Sequence[Candidate]) -> Iterator[tuple[dict[str, Answer], dict[str, Answer]]]:
        """For each candidate, by form: what the served model answers, and what the public one does."""


def restrict(logprobs: Tensor, form: str) -> Answer:
    """What an endpoint of this form lets through of its distribution `[positions, V]`."""
    if form == "full":
        return FullAnswer(logprobs)
    if form == "top_k":
        values, ids = logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1)
        return TopKAnswer(ids, values, logprobs.shape[-1])
    if form == "token":
        return TokenAnswer(logprobs.argmax(dim=-1))
    raise ValueError(f"an endpoint answers in one of {FORMS}, not {form!r}")


def endpoint_signals(served: Answer, public: Answer, candidate: Candidate) -> RecordSignals:
    """An endpoint's answers about a record as scores need them.

    A token that is not among the k most likely is given the most it can have: the remaining mass, evenly spread, or the
    k-th probability. Of a token answer only a hit (0) or a miss (-1) is known.
    """
    targets = torch.tensor(candidate.example.ids[candidate.example.loss_from :])
    mean, deviation = _moments(served)
    return RecordSignals(
        log_p=_of_targets(served, targets),
        log_reference=_of_targets(public, targets),
        text=candidate.record.text,
        mean=mean,
        deviation=deviation,
    )


def moments(logprobs: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of log p(.) under p, `[positions]` each."""
    probabilities = logprobs.exp()
    finite = torch.where(probabilities > 0, logprobs, 0.0)
    mean = (probabilities * finite).sum(-1)
    variance = (probabilities * (finite - mean[..., None]) ** 2).sum(-1)
    return mean.double().cpu().numpy(), variance.clamp(min=0).sqrt().double().cpu().numpy()


def _moments(answer: Answer) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.float64] | None]:
    return moments(answer.logprobs) if isinstance(answer, FullAnswer) else (None, None)


def _of_targets(answer: Answer, targets: Tensor) -> npt.NDArray[np.float64]:
    if isinstance(answer, FullAnswer):
        found = answer.logprobs.gather(-1, targets[:, None].to(answer.logprobs.device)).squeeze(-1)
    elif isinstance(answer, TopKAnswer):
        found = _of_listed(answer, targets.to(answer.ids.device))
    else:
        found = (answer.ids == targets.to(answer.ids.device)).double() - 1
    return found.double().cpu().numpy()


def _of_listed(answer: TopKAnswer, targets: Tensor) -> Tensor:
    listed = answer.ids == targets[:, None]
    rest = (1 - answer.logprobs.exp().sum(-1)).clamp(min=1e-12)
    spread = rest.log() - np.log(max(1, answer.vocabulary_size - answer.ids.shape[-1]))
    missing = torch.minimum(spread, answer.logprobs[:, -1])
    return torch.where(listed.any(-1), torch.where(listed, answer.logprobs, 0.0).sum(-1), missing)
