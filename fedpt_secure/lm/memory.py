"""How much memory a client's training takes, from shapes alone, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpt_secure.lm.head_loss import BLOCK_ROWS
from fedpt_secure.lm.part import TrainedPart
from fedpt_secure.lm.small import SmallLM

_HIDDEN_COPIES, _INNER_COPIES = 6, 4
"""Arrays of the layers' width, and of their inner width, that a layer keeps for the backward pass, rounded up; Llama's
keeps some 5 and 3 (tests/lm/test_memory.py counts them)."""
_HEAD_BLOCKS = 3
"""Logits, log-probabilities and the scattered difference of one block of positions."""
_VECTOR_BYTES = 60
"""Of an entry of the adapter: one gradient in float32, sums, noise's four draws and the update in float64."""
_ALLOWANCE = 1.5
"""What an allocator holds beyond what is asked of it, and arrays that live for one operation."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes beyond those of the program itself (the interpreter and its libraries, some 350 MB).

    Attributes:
        weights: of the small LM, and of copies in lower precision.
        kept: most activations that are kept over steps.
        backward: activations of one example that are kept for its backward pass.
        working: everything else that one step needs.
    """

    weights: int
    kept: int
    backward: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kept + self.backward + self.working


def training_memory(small: SmallLM, part: TrainedPart, *, context_length: int) -> TrainingMemory:
    """An estimate for one example a pass, of at most `context_length` tokens; no lower than what was measured here.

    The lower the part's lowest layer, the more layers keep activations: also those above that are not trained, since
    the gradient passes through them. A smaller rank saves next to nothing.
    """
    config = small.model.config
    layers = int(config.num_hidden_layers)
    lowest = min(small.adapted_layers if part.layers is None else part.layers)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in small.model.parameters()}
    weights = 4 * sum(sizes.values())
    if small.compute.dtype != torch.float32:
        weights += 2 * sum(sizes.values())
    per_layer = 4 * context_length * (_HIDDEN_COPIES * width + _INNER_COPIES * inner)
    head = 4 * _HEAD_BLOCKS * min(context_length, BLOCK_ROWS) * vocabulary
    working = head + _VECTOR_BYTES * small.dimension + per_layer
    return TrainingMemory(
        weights=weights,
        kept=small.compute.cache_bytes,
        backward=(layers - lowest) * per_layer + 4 * context_length * width,
        working=int(_ALLOWANCE * working),
    )
