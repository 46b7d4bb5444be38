"""One record as the small LM sees it, and its loss: what the privacy mechanisms protect and differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedpt_secure.lm.small import SmallLM


@dataclass(frozen=True, slots=True)
class SmallExample:
    """One record in the small LM's vocabulary.

    Attributes:
        ids: token ids, the separator first.
        loss_from: first position that is predicted with loss, at least 1 and below `len(ids)`.
    """

    ids: tuple[int, ...]
    loss_from: int


def example_losses(small: SmallLM, batch: Sequence[SmallExample]) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of each example's own loss tokens, `[len(batch)]`.

    The mean is over the example's tokens, never over the batch's: an example's gradient must not depend on the
    others.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for row, example in enumerate(batch):
        content = torch.tensor(example.ids)
        ids[row, : len(content)] = content
        targets[row, example.loss_from - 1 : len(content) - 1] = content[example.loss_from :]
    # Padding is on the right of causal attention, so that no loss token ever sees it: no mask is needed.
    logits = small.model(input_ids=ids.to(small.device), use_cache=False).logits.float()
    targets = targets.to(small.device)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    counts = (targets != -100).sum(1)
    return losses.view(len(batch), width).sum(1) / counts
