"""The head's loss at chosen positions, and its gradient, over one array of logits.

A head of V words makes T V numbers for T positions. Autograd keeps them for the backward pass and makes as many
again there, and the log-softmax beside them. The head is frozen here, so all that leaves it is the gradient at its
input, T H numbers: it is formed in the forward pass, block of positions by block, and the logits are dropped.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK_ROWS = 128
"""Positions whose logits exist at a time: 8 MB in float32 for 16,384 tokens, near the processor."""


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) under `softmax(hidden weight^T)`; differentiable in `hidden` only.

    Matrix products are in the weight's type, the softmax is in float32.

    Args:
        hidden: [positions, width].
        weight: of the head, [vocabulary, width]; frozen.
        targets: int64 [positions].
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
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
