"""Running a Transformers causal LM: whole texts in padded batches, continuations with a key-value cache.

Both the local black box and the small pair are built on these two; neither knows whose model it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fedpt_secure.errors import ModelError
from fedpt_secure.proxy.row_cache import RowCache, layer_count

Forward = Callable[..., Any]
"""A model's forward: keyword arguments of Transformers in, an output with `.logits` `[batch, seq, width]` out."""

_UNLIMITED_CONTEXT = 1 << 20
# Small enough that the temporaries stay in cache and are reused; buffers of 128 rows cost 2-3 times as much on a CPU.
_ROWS_NORMALISED_AT_ONCE = 16
# Columns that no row uses any more, before the cache is copied to be rid of them.
_IDLE_COLUMNS = 64


def score_batches(
    forward: Forward, sequences: Sequence[Sequence[int]], *, batch_tokens: int, device: torch.device
) -> Iterator[Tensor]:
    """Logits after every position, one sequence at a time, in order: `[len, width]` in the model's dtype.

    `score_copies` of a forward with one row per row of the batch.
    """
    for logits in score_copies(forward, sequences, copies=1, batch_tokens=batch_tokens, device=device):
        yield logits[0]


def score_copies(
    forward: Forward, sequences: Sequence[Sequence[int]], *, copies: int, batch_tokens: int, device: torch.device
) -> Iterator[Tensor]:
    """Logits after every position, one sequence at a time, in order: `[copies, len, width]` in the model's dtype.

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
            yield logits[row :: len(batch), : len(sequence)]


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

    Rows of different lengths lie flush right in the cache, are masked out to their left, and count their positions from
    their own first token, so a row's logits do not depend on the other rows.

    Args:
        forward: the model; called with a cache.
        config: its configuration.
        prompts: at least one, none empty.
        device: where the model lies.
        keywords: what the forward takes (`forward_keywords`).
        copies: how many rows each layer computes per row of the batch, layer by layer, never falling; the logits have
            as many as the last. By default one everywhere.

    Raises:
        ModelError: the model keeps something else than keys and values.
    """

    def __init__(
        self,
        forward: Forward,
        config: PreTrainedConfig,
        prompts: Sequence[Sequence[int]],
        *,
        device: torch.device,
        keywords: frozenset[str],
        copies: Sequence[int] | None = None,
    ) -> None:
        self._forward = forward
        self._config = config
        self._device = device
        self._keywords = keywords
        self._copies = list(copies) if copies is not None else [1] * layer_count(config)
        self._cache = RowCache(self._copies)
        self._lengths = [0] * len(prompts)
        self._blocks: list[int] = []
        self._scored: Tensor | None = None
        self._logits = self._advance(prompts)

    @property
    def logits(self) -> Tensor:
        """The logits after the last token of each row, `[copies * batch, width]`, copy by copy."""
        return self._logits

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return list(self._lengths)

    def append(self, ids: Sequence[int]) -> None:
        """Extend each row by one token."""
        self._logits = self._advance([[token] for token in ids])

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Add a row per prompt behind the present ones."""
        added = CachedContinuation(
            self._forward,
            self._config,
            prompts,
            device=self._device,
            keywords=self._keywords,
            copies=self._copies,
        )
        for mine, theirs in zip(self._cache.row_layers, added._cache.row_layers, strict=True):
            mine.join(theirs)
        logits = [self._by_copy(side) for side in (self._logits, added._logits)]
        self._logits = torch.cat(logits, dim=1).flatten(0, 1)
        self._lengths += added._lengths

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._device)
        batch = len(self._lengths)
        self._lengths = [self._lengths[row] for row in rows]
        first = self._cache.columns - max(self._lengths)
        for layer in self._cache.row_layers:
            layer.select(index, batch, first)
        self._logits = self._by_copy(self._logits)[:, index].flatten(0, 1)

    def score(self, blocks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after each row's last token and after each token of its block, `[copies, len(block) + 1, width]`.

        The next call must be `keep`.
        """
        before = self._by_copy(self._logits)
        if any(blocks):
            self._scored = self._by_copy(self._run(blocks, range(max(map(len, blocks)))))
        else:
            self._blocks = [0] * len(blocks)
            self._scored = before[:, :, None][:, :, :0]
        return [
            torch.cat([before[:, row, None], self._scored[:, row, : len(block)]], dim=1)
            for row, block in enumerate(blocks)
        ]

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first tokens of each scored block, forget the others."""
        if self._scored is None:
            raise ModelError("nothing was scored, so there is nothing to keep")
        logits = self._by_copy(self._logits).clone()
        for row, count in enumerate(counts):
            if count:
                logits[:, row] = self._scored[:, row, count - 1]
        self._logits, self._scored = logits.flatten(0, 1), None
        self._settle(counts)

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each row's last tokens. What comes after them is unknown until every row is extended again."""
        # Seen from the columns before all that is forgotten anywhere, each row has a block of which a part stays.
        longest = max(counts)
        self._blocks = [longest] * len(counts)
        self._lengths = [length - longest for length in self._lengths]
        self._settle([longest - count for count in counts])

    def _advance(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Take in a block of at least one token per row; the logits after its last token, `[copies * batch, width]`."""
        last = [len(block) - 1 for block in blocks]
        columns = sorted(set(last))
        logits = self._run(blocks, columns)
        self._settle([len(block) for block in blocks])
        if len(columns) == 1:
            return logits[:, 0]
        place = torch.tensor([columns.index(column) for column in last], device=self._device)
        rows = torch.arange(len(last), device=self._device)
        return self._by_copy(logits)[:, rows, place].flatten(0, 1)

    def _run(self, blocks: Sequence[Sequence[int]], columns: Sequence[int]) -> Tensor:
        """Logits after the given columns of the blocks, `[copies * batch, len(columns), width]`."""
        widths = [len(block) for block in blocks]
        longest, before = max(widths), self._cache.columns
        ids = torch.zeros(len(blocks), longest, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        for row, (block, length) in enumerate(zip(blocks, self._lengths, strict=True)):
            ids[row, : len(block)] = torch.as_tensor(block, dtype=torch.int64)
            # The padding repeats the last position: one more might be past the model's context.
            positions[row] = (length + torch.arange(longest)).clamp(max=length + len(block) - 1)
        mask: Tensor | None = None
        if min(widths) < longest or min(self._lengths) < before:
            column = torch.arange(before + longest)
            starts = before - torch.tensor(self._lengths)[:, None]
            ends = before + torch.tensor(widths)[:, None]
            mask = ((column >= starts) & (column < ends)).long().to(self._device)
        every = len(columns) == longest
        # Transformers 5.24 calls the cache by another name.
        options: dict[str, Any] = {"cache" if "cache" in self._keywords else "past_key_values": self._cache}
        picks = not every and "logits_to_keep" in self._keywords
        if picks:
            options["logits_to_keep"] = torch.tensor(columns, device=self._device)
        output = self._forward(
            input_ids=ids.to(self._device),
            attention_mask=mask,
            position_ids=positions.to(self._device),
            use_cache=True,
            **options,
        )
        self._blocks = widths
        logits: Tensor = output.logits
        return logits if every or picks else logits[:, list(columns)]

    def _settle(self, counts: Sequence[int]) -> None:
        """Of each row's block in the last columns keep the first `count` tokens; put the rows flush right again."""
        kept, batch = max(counts), len(counts)
        before = self._cache.columns - max(self._blocks)
        for row, count in enumerate(counts):
            if count < kept:
                first = before - self._lengths[row]
                for layer in self._cache.row_layers:
                    layer.shift(row, batch, first=first, last=before + count, by=kept - count)
        self._cache.truncate(before + kept)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        if self._cache.columns - max(self._lengths) > _IDLE_COLUMNS:
            self.select(range(batch))

    def _by_copy(self, rows: Tensor) -> Tensor:
        """`[copies * batch, ...]` as `[copies, batch, ...]`."""
        return rows.reshape(self._copies[-1], -1, *rows.shape[1:])


def context_length(config: PreTrainedConfig) -> int:
    """The most positions a model takes; a very large number where its architecture sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else _UNLIMITED_CONTEXT


def forward_keywords(model: torch.nn.Module) -> frozenset[str]:
    """The keyword arguments of a model's forward. With `logits_to_keep` it can leave out logits nobody reads, which
    saves memory on long prompts."""
    return frozenset(inspect.signature(model.forward).parameters)


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
