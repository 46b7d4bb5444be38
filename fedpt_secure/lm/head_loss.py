"""The head's loss at chosen positions, and its gradient, over one array of logits.

A head of V words makes T V numbers for T positions. Autograd keeps them for the backward pass and makes as many
again there, and the log-softmax beside them. The head's matrix is frozen here, so all that leaves it is the gradient at
its input, T H numbers, and that by its bias, V numbers: they are formed in the forward pass, block of positions by
block, and the logits are dropped.
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
        rows: int64 [n], which they are.
        weight: [n, width].
        log_weights: float32 [n].
        places: int64 [vocabulary].
    """

    rows: torch.Tensor
    weight: torch.Tensor
    log_weights: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, classes: OutputClasses) -> SampledHead:
        """Gather the classes' rows, on the head's device."""
        device = weight.device
        rows = classes.rows.to(device)
        return cls(rows, weight[rows], classes.log_weights.to(device), classes.places.to(device))


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sampled: SampledHead | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) under `softmax(hidden weight^T + bias)`.

    Differentiable in `hidden` and `bias` only.

    Matrix products are in the weight's type, the softmax is in float32.

    Args:
        hidden: [positions, width].
        weight: of the head, [vocabulary, width]; frozen.
        targets: int64 [positions].
        sampled: what the softmax is over beside each position's own class; every class if None.
        bias: float32 [vocabulary]; none if None.
    """
    loss: torch.Tensor
    if sampled is None:
        loss = _HeadLoss.apply(hidden, weight, targets, bias)  # type: ignore[no-untyped-call]
    else:
        loss = _SampledHeadLoss.apply(hidden, weight, targets, sampled, bias)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        by_bias = None if bias is None else torch.zeros_like(bias)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            logits = (hidden[rows].to(weight.dtype) @ weight.T).float()
            if bias is not None:
                logits += bias
            logprobs = torch.log_softmax(logits, dim=1)
            wanted = targets[rows, None]
            loss -= logprobs.gather(1, wanted).sum()
            difference = logprobs.exp_()
            difference.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=difference.dtype))
            gradient[rows] = (difference.to(weight.dtype) @ weight).to(gradient.dtype)
            if by_bias is not None:
                by_bias += difference.sum(0)
        _keep(ctx, gradient, by_bias)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_hidden, by_bias = _scaled(ctx, of_loss)
        return by_hidden, None, None, by_bias


class _SampledHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        sampled: SampledHead,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        by_bias = None if bias is None else torch.zeros_like(bias)
        added = sampled.log_weights if bias is None else sampled.log_weights + bias[sampled.rows]
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            own_weight = weight[targets[rows]].float()
            own = (hidden[rows].float() * own_weight).sum(1, keepdim=True)
            if bias is not None:
                own += bias[targets[rows], None]
            logits = (hidden[rows].to(weight.dtype) @ sampled.weight.T).float() + added
            # A position's own class counts once, and for itself alone.
            places = sampled.places[targets[rows], None]
            held = logits.gather(1, places.clamp(min=0))
            logits.scatter_(1, places.clamp(min=0), torch.where(places < 0, held, -torch.inf))
            logprobs = torch.log_softmax(torch.cat([logits, own], dim=1), dim=1)
            loss -= logprobs[:, -1].sum()
            probabilities = logprobs.exp_()
            others = (probabilities[:, :-1].to(weight.dtype) @ sampled.weight).float()
            gradient[rows] = (others + (probabilities[:, -1:] - 1) * own_weight).to(gradient.dtype)
            if by_bias is not None:
                by_bias.index_add_(0, sampled.rows, probabilities[:, :-1].sum(0))
                by_bias.index_add_(0, targets[rows], probabilities[:, -1] - 1)
        _keep(ctx, gradient, by_bias)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_hidden, by_bias = _scaled(ctx, of_loss)
        return by_hidden, None, None, None, by_bias


def _keep(ctx: Any, by_hidden: torch.Tensor, by_bias: torch.Tensor | None) -> None:
    """A loss's gradients, of a sum over positions, for the backward pass of their mean."""
    positions = len(by_hidden)
    ctx.save_for_backward(by_hidden / positions, None if by_bias is None else by_bias / positions)


def _scaled(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    by_hidden, by_bias = ctx.saved_tensors
    return by_hidden * of_loss, None if by_bias is None else by_bias * of_loss
