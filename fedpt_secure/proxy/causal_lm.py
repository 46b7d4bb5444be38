"""Running a Transformers causal LM: whole texts in padded batches, continuations with a key-value cache.

Both the local black box and the small pair are built on these two; neither knows whose model it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

Forward = Callable[..., Any]
"""A model's forward: keyword arguments of Transformers in, an output with `.logits` `[batch, seq, width]` out."""

_UNLIMITED_CONTEXT = 1 << 20
# Small enough that the temporaries stay in cache and are reused; buffers of 128 rows cost 2-3 times as much on a CPU.
_ROWS_NORMALISED_AT_ONCE = 16


def score_batches(
    forward: Forward, sequences: Sequence[Sequence[int]], *, batch_tokens: int, device: torch.device
) -> Iterator[Tensor]:
    """Logits after every position, one sequence at a time, in order: `[len, width]` in the model's dtype.

    Neighbouring sequences share a right-padded batch of at most `batch_tokens` positions, padding included (a longer
    sequence runs alone). One batch of logits is alive at a time.
    """
    for batch in _batches(sequences, batch_tokens):
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
            mask[row, : len(sequence)] = 1
        logits = forward(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for row, sequence in enumerate(batch):
            yield logits[row, : len(sequence)]


def log_distribution(logits: Tensor, size: int) -> Tensor:
    """Float32 log-probabilities of the first `size` columns: `[rows, width]` to `[rows, size]`, in chunks of rows.

    The columns beyond the real tokens are padding of the output layer; no probability is left on them.
    """
    result = torch.empty(logits.shape[0], size, dtype=torch.float32, device=logits.device)
    for first in range(0, logits.shape[0], _ROWS_NORMALISED_AT_ONCE):
        chunk = slice(first, first + _ROWS_NORMALISED_AT_ONCE)
        result[chunk] = torch.log_softmax(logits[chunk, :size].float(), dim=-1)
    return result


class CachedContinuation:
    """A batch of continuations of one model, each position computed once.

    Prompts of different lengths are padded on the left, masked out, and their positions counted from the first real
    token, so a row's logits do not depend on the other rows.

    Args:
        forward: the model; called with `past_key_values`.
        config: its configuration (which layers keep how much).
        prompts: at least one, none empty.
        device: where the model lies.
        last_only: the forward takes `logits_to_keep` (`keeps_last_logits`).
    """

    def __init__(
        self,
        forward: Forward,
        config: PreTrainedConfig,
        prompts: Sequence[Sequence[int]],
        *,
        device: torch.device,
        last_only: bool,
    ) -> None:
        self._forward = forward
        self._device = device
        self._options = {"logits_to_keep": 1} if last_only else {}
        self._cache = DynamicCache(config=config)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
            mask[row, longest - len(prompt) :] = 1
        self._mask = mask.to(device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._logits = self._run(ids.to(device), positions)

    @property
    def logits(self) -> Tensor:
        """The logits after the last token of each row, `[batch, width]`."""
        return self._logits

    def append(self, ids: Sequence[int]) -> None:
        """Extend each row by one token."""
        column = torch.as_tensor(ids, dtype=torch.int64, device=self._device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)
        self._logits = self._run(column, self._mask.sum(dim=1, keepdim=True) - 1)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._forward(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def context_length(config: PreTrainedConfig) -> int:
    """The most positions a model takes; a very large number where its architecture sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else _UNLIMITED_CONTEXT


def keeps_last_logits(model: torch.nn.Module) -> bool:
    """Whether the model can compute the last position's logits alone, which saves memory on long prompts."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], len(sequence)
        batch.append(sequence)
    if batch:
        yield batch
