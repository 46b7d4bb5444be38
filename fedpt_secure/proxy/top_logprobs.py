"""Truncated answers: the k most likely tokens of a position, checked, and completed to a whole distribution.

An API that returns the `k` most likely tokens leaves a *tail*: the other `V - k` tokens, of which only the total mass
`1 - sum(returned)` is known, and that none is likelier than the least likely returned one. `complete` fills it with the
*shape* of a model that is known over the whole vocabulary (the small base LM, spread over the large vocabulary):

    p(t) = min(c q(t), p_least)        for t outside the returned set, c such that the tail keeps its mass

The returned tokens keep their probabilities exactly. A uniform tail would call the rarest token as likely as the
likeliest one left out; it turned a gain of proxy tuning into a loss (docs/proxy.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError

LARGEST_EXCESS = 1e-3
"""How far a log-probability may lie above 0, and the log of a total mass above 0: room for rounding to 4 digits."""

_LIKELY_CAPPED = 2048
"""As many tokens at the cap are looked for before all are."""

_EXCLUDED_BELOW = -1e30
"""llama.cpp writes the lowest float32 for the logarithm of 0; so does whoever has no infinity in JSON."""


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most likely tokens of one position, most likely first.

    Attributes:
        ids: int64 `[k]`, distinct large token ids.
        logprobs: float64 `[k]`, descending, at most 0; -inf for tokens the API excludes.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]

    @classmethod
    def checked(
        cls,
        ids: Sequence[int],
        logprobs: Sequence[float],
        *,
        asked: int,
        vocabulary_size: int,
        width: int = 0,
        strict: bool = True,
    ) -> TopLogprobs:
        """An API's answer, or an error that says what is wrong with it.

        Entries beyond the `asked` most likely are dropped: APIs add the token that the text has at a position, and a
        distribution that depends on the token it predicts is none.

        Args:
            ids: as they came, in any order.
            logprobs: one per id.
            asked: how many were asked for.
            vocabulary_size: V; ids are below it.
            width: columns of the model's output layer where they are known; those from V on are padding, are dropped,
                and whole answers are normalised without them.
            strict: fewer than asked for is an error. False where the API's format can lose some.

        Raises:
            BlackBoxError: an id outside the vocabulary or twice, a value that is NaN, infinite or above 0, more mass
                than 1, or tokens that are missing.
        """
        columns = np.asarray(ids, dtype=np.int64)
        values = np.asarray(logprobs, dtype=np.float64)
        if columns.shape != values.shape or columns.ndim != 1:
            raise BlackBoxError(f"the API gave {columns.size} tokens and {values.size} log-probabilities")
        padding = (columns >= vocabulary_size) & (columns < width)
        columns, values = columns[~padding], values[~padding]
        foreign = columns[(columns < 0) | (columns >= vocabulary_size)]
        if foreign.size:
            raise BlackBoxError(
                f"the API answered with token id {foreign[0]}; the tokenizer has {vocabulary_size} tokens",
                hint="the server runs a model with another vocabulary; give its own tokenizer (--large-tokenizer)",
            )
        if np.unique(columns).size != columns.size:
            counts = np.bincount(columns)
            raise BlackBoxError(f"the API answered with token id {int(counts.argmax())} {int(counts.max())} times")
        wrong = ~(values <= LARGEST_EXCESS)  # NaN too
        if wrong.any():
            raise BlackBoxError(
                f"the API gave token id {columns[wrong][0]} the log-probability {values[wrong][0]}, not at most 0",
                hint="the API returns logits or damaged numbers instead of log-probabilities",
            )
        wanted = min(asked, vocabulary_size)
        if not columns.size or (strict and columns.size < wanted):
            raise BlackBoxError(
                f"the API answered with {columns.size} tokens where {wanted} were asked for",
                hint=f"the API's limit may be lower: set api.top_k to {max(1, columns.size)}",
            )
        order = np.argsort(-values, kind="stable")[:wanted]
        values = np.where(values[order] < _EXCLUDED_BELOW, -np.inf, np.minimum(values[order], 0.0))
        log_mass = float(np.logaddexp.reduce(values))
        if not log_mass <= LARGEST_EXCESS:
            raise BlackBoxError(
                f"the API's {columns.size} tokens have a total mass of {math.exp(min(log_mass, 700)):.4g}, more than 1",
                hint="the API returns scores that are not log-probabilities",
            )
        if width > vocabulary_size == columns.size:
            values = values - log_mass
        return cls(columns[order], values)

    def with_scores(self, ids: Sequence[int], logprobs: Sequence[float]) -> TopLogprobs:
        """The answer and more tokens that the API was asked about one by one; known ones keep their value.

        The union is no longer the most likely tokens in a row, so the bound on the tail stays the least likely of the
        *first* answer's; see `complete`.
        """
        fresh = [(i, lp) for i, lp in zip(ids, logprobs, strict=True) if i not in set(self.ids.tolist())]
        if not fresh:
            return self
        more = np.array([i for i, _ in fresh], dtype=np.int64), np.array([lp for _, lp in fresh], dtype=np.float64)
        return TopLogprobs(np.concatenate([self.ids, more[0]]), np.concatenate([self.logprobs, more[1]]))


def dense(top: TopLogprobs, vocabulary_size: int) -> Tensor:
    """A full answer as a row: float32 `[V]`, normalised; the tokens that are absent must be none.

    Raises:
        BlackBoxError: tokens are missing, or the mass is not 1.
    """
    if top.ids.size != vocabulary_size:
        raise BlackBoxError(f"the answer holds {top.ids.size} of {vocabulary_size} tokens; the rest is unknown")
    log_mass = float(np.logaddexp.reduce(top.logprobs))
    if not abs(log_mass) <= LARGEST_EXCESS * 10:
        raise BlackBoxError(
            f"the API's {vocabulary_size} tokens have a total mass of {math.exp(log_mass):.4g}, not 1",
            hint="the API biases or truncates what it returns",
        )
    row = torch.empty(vocabulary_size, dtype=torch.float64)
    row[torch.from_numpy(top.ids)] = torch.from_numpy(top.logprobs - log_mass)
    return row.float()


def complete(top: TopLogprobs, shape: Tensor, *, bound: float | None = None) -> Tensor:
    """The returned tokens exactly, all others by `shape`: normalised float32 `[V]`.

    Args:
        top: what the API returned.
        shape: float `[V]`, log-probabilities of a model over the whole vocabulary, all finite.
        bound: the log-probability that no token outside may pass; None: that of the least likely returned token.

    Returns:
        Log-probabilities. Where the returned mass is 1 up to rounding, the tail still gets 1e-9 of it, so that a token
        the API left out never has probability 0.
    """
    ids = torch.from_numpy(top.ids)
    known = torch.from_numpy(top.logprobs)
    row = shape.double().clone()
    row[ids] = -math.inf
    returned = float(known.exp().sum())
    tail = max(1.0 - returned, 1e-9)
    outside = row.numel() - ids.numel()
    if outside == 0:
        row[ids] = known
        return torch.log_softmax(row, dim=-1).float()
    finite = known[torch.isfinite(known)]
    least = bound if bound is not None else float(finite.min()) if finite.numel() else 0.0
    # No bound below the uniform tail can hold: rounding may put the least likely returned token there.
    cap = max(least, math.log(tail / outside) + 1e-6)
    row = _capped(torch.log_softmax(row, dim=-1) + math.log(tail), cap, math.log(tail))
    row[ids] = known
    return torch.log_softmax(row, dim=-1).float()


def _capped(values: Tensor, cap: float, log_mass: float) -> Tensor:
    """`min(c + values, cap)` with `c` such that the total mass `exp(log_mass)` is kept; `values` have it already.

    With the values in falling order, the first `m` are at the cap and the rest are scaled by
    `(mass - m e^cap) / rest(m)`; `m` is the least count at which the next value stays below the cap.
    """
    if float(values.max()) <= cap:
        return values
    for most in (_LIKELY_CAPPED, values.numel()):
        falling, order = values.topk(min(most, values.numel()))
        mass = math.exp(log_mass)
        rest = mass - torch.cat([torch.zeros(1, dtype=torch.float64), falling.exp().cumsum(0)[:-1]])
        left = mass - torch.arange(len(falling), dtype=torch.float64) * math.exp(cap)
        scale = left.clamp(min=0) / rest.clamp(min=1e-300)
        settled = torch.nonzero(falling.exp() * scale <= math.exp(cap))
        if settled.numel():
            count = int(settled[0])
            result = values + math.log(max(float(scale[count]), 1e-300))
            result[order[:count]] = cap
            return result.clamp(max=cap)
    return values.clamp(max=cap)
