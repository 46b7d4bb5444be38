"""The head's loss at chosen positions, and its gradient, over one array of logits.

A head of V words makes T V numbers for T positions. Autograd keeps them for the backward pass and makes as many
again there, and the log-softmax beside them. The head is frozen here, so all that leaves it is the gradient at its
input, T H numbers: it is formed in the forward pass, block of positions by block, and the logits are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedpt_secure.lm.output_classes import OutputClasses

BLOCK_ROWS = 128
"""Positions whose logits exist at a time: 8 MB in float32 for 16,384 tokens, near the processor."""


@dataclass(frozen=True, slots=True)
class SampledHead:
    """Some rows of a head, gathered (`lm.output_classes`).

    Attributes:
        weight: [n, width].
        log_weights: float32 [n].
        places: int64 [vocabulary].
    """

    weight: torch.Tensor
    log_weights: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, classes: OutputClasses) -> SampledHead:
        """Gather the classes' rows, on the head's device."""
        device = weight.device
        return cls(weight[classes.rows.to(device)], classes.log_weights.to(device), classes.places.to(device))


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sampled: SampledHead | None = None
) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) under `softmax(hidden weight^T)`; differentiable in `hidden` only.

    Matrix products are in the weight's type, the softmax is in float32.

    Args:
        hidden: [positions, width].
        weight: of the head, [vocabulary, width]; frozen.
        targets: int64 [positions].
        sampled: what the softmax is over beside each position's own class; every class if None.
    """
    loss: torch.Tensor
    if sampled is None:
        loss = _HeadLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    else:
        loss = _SampledHeadLoss.apply(hidden, weight, targets, sampled)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            logits = (hidden[rows].to(weight.dtype) @ weight.T).float()
            logprobs = torch.log_softmax(logits, dim=1)
            wanted = targets[rows, None]
            loss -= logprobs.gather(1, wanted).sum()
            difference = logprobs.exp_()
            difference.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=difference.dtype))
            gradient[rows] = (difference.to(weight.dtype) @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient / len(hidden))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss, None, None


class _SampledHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sampled: SampledHead
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            own_weight = weight[targets[rows]].float()
            own = (hidden[rows].float() * own_weight).sum(1, keepdim=True)
            logits = (hidden[rows].to(weight.dtype) @ sampled.weight.T).float() + sampled.log_weights
            # A position's own class counts once, and for itself alone.
            places = sampled.places[targets[rows], None]
            held = logits.gather(1, places.clamp(min=0))
            logits.scatter_(1, places.clamp(min=0), torch.where(places < 0, held, -torch.inf))
            logprobs = torch.log_softmax(torch.cat([logits, own], dim=1), dim=1)
            loss -= logprobs[:, -1].sum()
            probabilities = logprobs.exp_()
            others = (probabilities[:, :-1].to(weight.dtype) @ sampled.weight).float()
            gradient[rows] = (others + (probabilities[:, -1:] - 1) * own_weight).to(gradient.dtype)
        ctx.save_for_backward(gradient / len(hidden))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss, None, None, None
