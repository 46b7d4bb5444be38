"""A key-value cache whose rows come, go, and take tokens back.

Transformers' own caches grow by copying themselves at every step and cannot lose some rows' last tokens. Here each
layer writes into a buffer with room to spare, and rows stay *flush right*: the tokens of a row lie without gaps in the
last columns of the buffer, so that distances in columns are distances in the text and a row's first column follows
from its length.

A layer may hold several *copies* of every row: the small LM keeps one key-value cache for base and tuned below its
first adapted layer, and two from there on (`proxy.folded_adapter`). The rows of copy `c` are `c * batch ... `.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from fedpt_secure.errors import ModelError

_SPARE_COLUMNS = 64


class RowLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library does not type it
    """Keys and values of one layer: buffers `[copies * batch, heads, capacity, width]`, filled up to `columns`."""

    is_sliding = False

    def __init__(self, copies: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = copies
        self.columns = 0
        self._keys = self._values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        columns = key_states.shape[2]
        self._keys, self._values = (_with_room(states[:, :, :0], columns) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._keys, self._values = (
                _with_room(held[:, :, : self.columns], end + end // 2) for held in (self._keys, self._values)
            )
        self._keys[:, :, self.columns : end] = key_states
        self._values[:, :, self.columns : end] = value_states
        self.columns = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def shift(self, row: int, batch: int, *, first: int, last: int, by: int) -> None:
        """Move columns `first ... last - 1` of a row to the right."""
        for buffer in (self._keys, self._values):
            rows = buffer[row::batch]
            rows[:, :, first + by : last + by] = rows[:, :, first:last].clone()

    def select(self, rows: Tensor, batch: int, first: int) -> None:
        """Keep some rows, and the columns from `first` on."""
        index = torch.cat([rows + copy * batch for copy in range(self.copies)])
        self._keys, self._values = (
            _with_room(buffer[index, :, first : self.columns], self.columns - first)
            for buffer in (self._keys, self._values)
        )
        self.columns -= first

    def join(self, other: RowLayer) -> None:
        """Put the rows of another cache behind these, flush right."""
        columns = max(self.columns, other.columns)
        self._keys, self._values = (
            _joined(mine[:, :, : self.columns], theirs[:, :, : other.columns], self.copies, columns)
            for mine, theirs in ((self._keys, other._keys), (self._values, other._values))
        )
        self.columns = columns


class RowCache(Cache):
    """One `RowLayer` per layer of a model.

    Args:
        copies: of each row, layer by layer.
    """

    def __init__(self, copies: Sequence[int]) -> None:
        self.row_layers = [RowLayer(count) for count in copies]
        super().__init__(layers=list(self.row_layers))

    @property
    def columns(self) -> int:
        """Filled columns, the same in all layers."""
        return self.row_layers[0].columns

    def truncate(self, columns: int) -> None:
        """Forget the columns from `columns` on."""
        for layer in self.row_layers:
            layer.columns = columns


def layer_count(config: PreTrainedConfig) -> int:
    """How many layers of a model keep keys and values.

    Raises:
        ModelError: some layers keep a running state instead, from which no row and no token can be taken back.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    other = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    if other:
        raise ModelError(
            f"decoding needs attention in every layer; this model has {other[0]} layers",
            hint="choose a model with attention only (Llama, SmolLM2, Qwen2, GPT-2, ...)",
        )
    return int(text.num_hidden_layers)


def _with_room(held: Tensor, columns: int) -> Tensor:
    """A buffer for `columns` and some spare ones that begins with what is held."""
    rows, heads, filled, width = held.shape
    buffer = held.new_zeros(rows, heads, max(columns, filled) + _SPARE_COLUMNS, width)
    buffer[:, :, :filled] = held
    return buffer


def _joined(mine: Tensor, theirs: Tensor, copies: int, columns: int) -> Tensor:
    rows = (mine.shape[0] + theirs.shape[0]) // copies
    mine_of_copy = mine.shape[0] // copies
    buffer = mine.new_zeros(copies, rows, mine.shape[1], columns + _SPARE_COLUMNS, mine.shape[3])
    # Zeros, not leftovers, in the masked columns: a NaN times a weight of 0 would still be NaN.
    buffer[:, :mine_of_copy, :, columns - mine.shape[2] : columns] = mine.reshape(copies, -1, *mine.shape[1:])
    buffer[:, mine_of_copy:, :, columns - theirs.shape[2] : columns] = theirs.reshape(copies, -1, *theirs.shape[1:])
    return buffer.flatten(0, 1)
