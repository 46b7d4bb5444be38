"""The distillation step of the proxy: batches, the fused head loss, the optimiser.

Device-agnostic; nothing here reads files or the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TAIL_RATIO = 20.0


@dataclass
class Batch:
    """Token ids are the small vocabulary's.

    Attributes:
        inputs, targets: int64 `[rows, seq]`.
        top_ids, top_probabilities: `[rows, seq, k]`; the teacher's answer at each position; probability 0 marks an
            entry that is not used (no answer, or a token outside the small vocabulary).
        has_teacher: bool `[rows, seq]`.
    """

    inputs: Tensor
    targets: Tensor
    top_ids: Tensor
    top_probabilities: Tensor
    has_teacher: Tensor


def _log_normaliser(logits: Tensor) -> Tensor:
    """float32 `[n, 1]` of logits `[n, v]` in any dtype."""
    return logits.float().logsumexp(-1, keepdim=True)


def _scaled_probabilities(logits: Tensor, normaliser: Tensor, factor: Tensor) -> Tensor:
    """`factor * softmax(logits)`, in the dtype of the logits."""
    return ((logits.float() - normaliser).exp() * factor).to(logits.dtype)


class HeadKernels:
    """The two passes over the logits.

    Args:
        compiled: fuse each into one loop.
        chunk: positions whose logits exist at one time.
    """

    def __init__(self, *, compiled: bool, chunk: int) -> None:
        self.chunk = chunk
        self.log_normaliser = torch.compile(_log_normaliser) if compiled else _log_normaliser
        self.scaled_probabilities = torch.compile(_scaled_probabilities) if compiled else _scaled_probabilities


class _HeadLoss(torch.autograd.Function):
    """Mean loss over positions; the gradient is formed with the logits, chunk by chunk, and never stored per token."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, top_ids, top_probabilities, mix, kernels):
        count = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        compute = weight.to(hidden.dtype)
        hard, soft = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, count, kernels.chunk):
            part = slice(begin, begin + kernels.chunk)
            h, y, share = hidden[part], targets[part, None], mix[part, None]
            ids, q = top_ids[part], top_probabilities[part]
            logits = h @ compute.T
            normaliser = kernels.log_normaliser(logits)
            hard += (normaliser - logits.gather(1, y).float()).sum()
            p = (logits.gather(1, ids).float() - normaliser).exp() * (q > 0)
            rest_p = (1 - p.sum(1, keepdim=True)).clamp(min=1e-4)
            rest_q = (1 - q.sum(1, keepdim=True)).clamp(min=0.0)
            ratio = (rest_q / rest_p).clamp(max=MAX_TAIL_RATIO)
            # KL over the classes {each known top token, everything else}: inside "everything else" the student
            # keeps its own proportions.
            kl = (q * (q.clamp(min=1e-9).log() - p.clamp(min=1e-9).log())).sum(1, keepdim=True)
            kl = kl + rest_q * (rest_q.clamp(min=1e-9).log() - rest_p.log())
            soft += (kl * (share > 0)).sum()
            gradient = kernels.scaled_probabilities(logits, normaliser, 1 - share * ratio)
            gradient.scatter_add_(1, ids, (share * (ratio * p - q)).to(gradient.dtype))
            gradient.scatter_add_(1, y, (share - 1).to(gradient.dtype))
            grad_hidden[part] = gradient @ compute
            grad_weight += (gradient.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = count
        answered = (mix > 0).sum().clamp(min=1)
        return hard / count, soft / answered

    @staticmethod
    def backward(ctx, grad_hard, _grad_soft):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_hard / ctx.count
        return grad_hidden * scale, grad_weight * scale, None, None, None, None, None


def head_loss(
    hidden: Tensor, weight: Tensor, batch: Batch, distill_share: float, kernels: HeadKernels
) -> tuple[Tensor, Tensor]:
    """Cross-entropy mixed with the teacher's divergence, through a tied head.

    Where the teacher answered, the loss is `(1 - distill_share) * CE + distill_share * KL`, elsewhere CE.

    Args:
        hidden: `[rows, seq, width]`, after the final norm, in the computing dtype.
        weight: `[vocab, width]`, the tied embedding.
        kernels: how the passes over the logits are run.

    Returns:
        The mean CE over all positions, and the mean KL over answered ones (for the log). Calling `backward` on the
        first applies the gradient of the *mixed* loss: the two share one pass over the logits.
    """
    flat = hidden.flatten(0, 1)
    mix = batch.has_teacher.flatten().float() * distill_share
    return _HeadLoss.apply(
        flat,
        weight,
        batch.targets.flatten(),
        batch.top_ids.flatten(0, 1),
        batch.top_probabilities.flatten(0, 1),
        mix,
        kernels,
    )


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for the matrices inside the layers.

    The update has spectral norm about 1, scaled by `0.2 * sqrt(max(rows, columns))` to match AdamW's update size
    (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                update = _orthogonal(parameter.grad.add(buffer, alpha=group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    x = matrix.to(torch.bfloat16)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if transposed else x).to(matrix.dtype)
