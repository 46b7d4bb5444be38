"""Which token of the small LM is which token of the large one.

The large tokenizer cuts the text; the small LM sees the same positions through this map. A small vocabulary is a subset
of the large one plus at most one *unknown* class, which stands for every large token outside the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.vocabulary import Vocabulary


class MapTensors(NamedTuple):
    """A token map as index tensors on one device, all int64."""

    small_of_large: Tensor
    """`[large_vocab]`: the small id of each large token; the unknown id for tokens outside the map."""
    large_of_small: Tensor
    """`[small_vocab]`: the large id of each small token; 0, a placeholder to be overwritten, at the unknown id."""
    outside: Tensor
    """`[outside_count]`: the large tokens outside the map, ascending."""


class TokenMap:
    """An injective map from small token ids to large ones, with at most one small id (the unknown class) left out.

    Guarantees: either the map is a bijection and `unknown_id` is None, or exactly one small id is unknown and at least
    one large token lies outside the map. So every large token belongs to exactly one small class, and no class is
    empty.

    Args:
        small_to_large: int64 `[small_vocab]`; -1 at the unknown id.
        large_vocabulary_size: the number of real tokens of the large model.

    Raises:
        ModelError: the map breaks one of these rules; the message names the first offending ids.
    """

    def __init__(self, small_to_large: np.ndarray | Sequence[int], large_vocabulary_size: int) -> None:
        table = np.array(small_to_large)
        if table.ndim != 1 or table.size == 0 or not np.issubdtype(table.dtype, np.integer):
            raise ModelError(f"a token map is a list of ids, not {table.dtype} of shape {table.shape}")
        table = table.astype(np.int64)
        table.setflags(write=False)
        self.small_to_large = table
        self.large_vocabulary_size = int(large_vocabulary_size)
        unknown = np.flatnonzero(table == -1)
        self.unknown_id = int(unknown[0]) if unknown.size else None
        self._by_device: dict[torch.device, MapTensors] = {}
        self._check(unknown)
        small_of_large = np.full(
            self.large_vocabulary_size, -1 if self.unknown_id is None else self.unknown_id, dtype=np.int64
        )
        mapped = np.flatnonzero(table >= 0)
        small_of_large[table[mapped]] = mapped
        small_of_large.setflags(write=False)
        self.small_of_large = small_of_large
        self.outside = np.setdiff1d(np.arange(self.large_vocabulary_size), table[mapped], assume_unique=True)
        if self.unknown_id is None and self.outside.size:
            raise ModelError(
                f"large token {self.outside[0]} has no small token and the map has no unknown token to stand for it",
                hint="mark one small id with -1",
            )
        if self.unknown_id is not None and not self.outside.size:
            raise ModelError(
                f"small token {self.unknown_id} is marked unknown, yet every large token is mapped",
                hint="leave the unknown token out of the small vocabulary",
            )

    def _check(self, unknown: np.ndarray) -> None:
        if unknown.size > 1:
            raise ModelError(f"small tokens {unknown[0]} and {unknown[1]} are both marked unknown; at most one may be")
        outside = np.flatnonzero((self.small_to_large < -1) | (self.small_to_large >= self.large_vocabulary_size))
        if outside.size:
            raise ModelError(
                f"small token {outside[0]} maps to {self.small_to_large[outside[0]]},"
                f" which is not one of the {self.large_vocabulary_size} large tokens",
                hint="the map was made for another large model",
            )
        order = np.argsort(self.small_to_large, kind="stable")
        twice = np.flatnonzero(np.diff(self.small_to_large[order]) == 0)
        if twice.size:
            first, second = order[twice[0]], order[twice[0] + 1]
            raise ModelError(
                f"small tokens {first} and {second} both map to large token {self.small_to_large[first]};"
                " the map must be injective"
            )

    @classmethod
    def identity(cls, size: int) -> TokenMap:
        """The map between two models with the same `size` tokens at the same ids."""
        return cls(np.arange(size), size)

    @classmethod
    def between(cls, small: Vocabulary, large: Vocabulary) -> TokenMap:
        """The map between two complete vocabularies, token string by token string.

        The output layers' widths do not matter; the order of the ids need not agree.

        Raises:
            ModelError: a token of one is missing in the other; the message names the first id at which they differ.
        """
        if small.digest == large.digest:
            return cls.identity(large.size)
        large_id = {token: token_id for token_id, token in enumerate(large.tokens)}
        if small.size != large.size or any(token not in large_id for token in small.tokens):
            small.require_same_tokens(large, name="the small vocabulary", other_name="the large vocabulary")
        return cls([large_id[token] for token in small.tokens], large.size)

    @property
    def small_vocabulary_size(self) -> int:
        """The number of small classes, the unknown one included; a small model's logits are cut to this."""
        return int(self.small_to_large.size)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over the sizes and the table as big-endian 64-bit integers."""
        content = np.concatenate([[self.large_vocabulary_size, self.small_to_large.size], self.small_to_large])
        return hashlib.sha256(content.astype(">i8").tobytes()).hexdigest()

    def to_small(self, large_ids: Sequence[int]) -> list[int]:
        """The small ids of large ids, position by position; the unknown id for tokens outside the map.

        Raises:
            ModelError: an id is not one of the large vocabulary.
        """
        ids = np.asarray(large_ids, dtype=np.int64)
        wrong = ids[(ids < 0) | (ids >= self.large_vocabulary_size)]
        if wrong.size:
            raise ModelError(
                f"token id {wrong[0]} is not one of the {self.large_vocabulary_size} large tokens",
                hint="the text was cut with another model's tokenizer",
            )
        small: list[int] = self.small_of_large[ids].tolist()
        return small

    def tensors(self, device: torch.device) -> MapTensors:
        """The map as index tensors on `device`, made once per device."""
        if device not in self._by_device:
            self._by_device[device] = MapTensors(
                small_of_large=torch.from_numpy(self.small_of_large.copy()).to(device),
                large_of_small=torch.from_numpy(self.small_to_large.clip(min=0)).to(device),
                outside=torch.from_numpy(self.outside.copy()).to(device),
            )
        return self._by_device[device]
