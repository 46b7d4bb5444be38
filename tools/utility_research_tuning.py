"""Central DP-SGD on LoRA matrices, as the sum over a cohort with secure aggregation computes it, and its optimisers.

Research code: the noise comes from PyTorch's seeded generator and protects nobody. What must agree with the product
does: per-example means, clipping to a public norm, Poisson sampling at a public rate, a public normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedpt_secure.data.examples import Example

HEAD_CHUNK = 512
BATCH_POSITIONS = 4096


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        ids: int64 `[rows, longest]`.
        judged: bool `[rows, longest]`; positions whose next token is predicted with loss.
        targets: int64 `[judged positions]`, the next tokens.
        rows: int64 `[judged positions]`, the example each belongs to.
        weights: float32 `[judged positions]`, one over the number of the example's judged positions.
    """

    ids: Tensor
    judged: Tensor
    targets: Tensor
    rows: Tensor
    weights: Tensor


def collate(examples: Sequence[Example], table: Tensor, device: torch.device) -> Batch:
    """Pad examples; `table` maps the large model's ids to the model's own."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    judged = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        judged[row, example.loss_from - 1 : len(example.ids) - 1] = True
    ids = table[ids]
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    counts = judged.sum(1)
    rows = judged.nonzero()[:, 0]
    parts = (ids, judged, following[judged], rows, 1.0 / counts[rows].float())
    return Batch(*(part.to(device) for part in parts))


def batches(indices: np.ndarray, examples: Sequence[Example], positions: int = BATCH_POSITIONS) -> Iterator[np.ndarray]:
    """Split indices into physical batches of like lengths, of about `positions` padded positions each."""
    lengths = np.array([len(examples[i].ids) for i in indices])
    order = indices[np.argsort(lengths, kind="stable")]
    start = 0
    while start < len(order):
        end, longest = start, 0
        while end < len(order):
            longest = max(longest, len(examples[order[end]].ids))
            if end > start and longest * (end - start + 1) > positions:
                break
            end += 1
        yield order[start:end]
        start = end


class _FrozenHeadLoss(torch.autograd.Function):
    """Weighted cross-entropy under a frozen head; the gradient is formed with the logits, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            logits = (hidden[part].to(head.dtype) @ head.T).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, targets[part, None]))[:, 0]
            share = weights[part, None]
            logits.sub_(normaliser).exp_().mul_(share).scatter_add_(1, targets[part, None], -share)
            gradient[part] = (logits.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, _grad_losses):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


class _FrozenHeadDivergence(torch.autograd.Function):
    """Mean KL(answers || model) over positions under a frozen head; the gradient is formed with the logits."""

    @staticmethod
    def forward(ctx, hidden, head, answers):
        gradient = torch.empty_like(hidden)
        total = 0.0
        for begin in range(0, len(hidden), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            logprobs = (hidden[part].to(head.dtype) @ head.T).float().log_softmax(1)
            wanted = answers[part].float()
            shares = wanted.exp()
            total += float((shares * (wanted - logprobs)).sum())
            logprobs.exp_().sub_(shares).div_(len(hidden))
            gradient[part] = (logprobs.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return hidden.new_tensor(total / len(hidden))

    @staticmethod
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None


def divergence(model: nn.Module, head: Tensor, batch: Batch, answers: Tensor) -> Tensor:
    """Mean divergence of a model from given log-probabilities `[judged, vocabulary]`; carries the gradient."""
    device = batch.ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=head.dtype == torch.bfloat16):
        hidden = model(input_ids=batch.ids, use_cache=False).last_hidden_state
    loss: Tensor = _FrozenHeadDivergence.apply(hidden[batch.judged], head, answers)
    return loss


def judged_losses(model: nn.Module, head: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of token losses (carries the gradient), and the token losses `[judged]`.

    Args:
        model: the transformer below the head (`LlamaModel`).
        head: `[vocabulary, width]`, frozen, in the computing dtype.
        batch: what `collate` made.
        weights: float32 `[judged]`.
    """
    device = batch.ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=head.dtype == torch.bfloat16):
        hidden = model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return _FrozenHeadLoss.apply(hidden[batch.judged], head, batch.targets, weights)


@contextmanager
def recorded(modules: Sequence[nn.Module], store: dict[int, Tensor]) -> Iterator[None]:
    """While open, each backward pass leaves the per-example weight gradients `[rows, out, in]` of linear modules."""

    def hook(key: int) -> Callable[..., None]:
        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0].detach()

            def backward(gradient: Tensor) -> None:
                store[key] = torch.einsum("bto,bti->boi", gradient.float(), seen.float())

            output.register_hook(backward)

        return forward

    handles = [module.register_forward_hook(hook(key)) for key, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Mechanism:
    """One release: Poisson sampling, clipping, the noised sum.

    Attributes:
        rate: public probability of a record taking part.
        clip_norm: L2 norm of a record's gradient at most.
        noise_multiplier: standard deviation of the noise over `clip_norm`; 0 is not private.
        thin: share of a sample whose gradients are really computed, to simulate large samples cheaply: the mean's
            noise is that of the whole sample, its sampling error that of the part (a little pessimistic).
    """

    rate: float
    clip_norm: float
    noise_multiplier: float
    thin: float = 1.0
    tokens: int = 0
    clipped: list[float] = field(default_factory=list)

    def release(
        self,
        model: nn.Module,
        head: Tensor,
        modules: Sequence[nn.Module],
        examples: Sequence[Example],
        table: Tensor,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> list[Tensor]:
        """The noised mean gradient of each module's weight; the normaliser is the expected sample size."""
        sampled = np.flatnonzero(rng.random(len(examples)) < self.rate * self.thin)
        sums = [torch.zeros_like(module.weight, dtype=torch.float32) for module in modules]
        store: dict[int, Tensor] = {}
        over = 0
        with recorded(modules, store):
            for chosen in batches(sampled, examples):
                batch = collate([examples[i] for i in chosen], table, head.device)
                loss, _ = judged_losses(model, head, batch, batch.weights)
                loss.backward()
                norms = torch.stack([store[k].flatten(1).norm(dim=1) for k in range(len(modules))]).norm(dim=0)
                factor = (self.clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
                over += int((factor < 1).sum())
                for key in range(len(modules)):
                    sums[key] += torch.einsum("b,boi->oi", factor, store.pop(key))
                self.tokens += int(batch.ids.numel())
        for module in modules:
            module.weight.grad = None
        self.clipped.append(over / max(1, len(sampled)))
        scale = self.noise_multiplier * self.clip_norm
        expected = self.rate * len(examples)
        return [
            (total / self.thin + scale * torch.randn(total.shape, generator=generator).to(total)) / expected
            for total in sums
        ]


@dataclass
class Optimiser:
    """What the server makes of a release: post-processing, so free of privacy cost.

    Attributes:
        kind: `adam`, `adam-corrected` (the noise's known variance is taken off the second moment), `momentum`, `sgd`.
        rate: learning rate at the plateau.
        decay: share of the steps, at the end, over which the rate falls linearly to zero.
        average: decay of the exponential average of iterates; 0 keeps the last iterate.
    """

    kind: str
    rate: float
    steps: int
    decay: float = 0.0
    average: float = 0.0
    momentum: float = 0.9
    second: float = 0.99
    noise_variance: float = 0.0
    _step: int = 0
    _first: list[Tensor] = field(default_factory=list)
    _square: list[Tensor] = field(default_factory=list)
    _mean: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Move the weights in place."""
        if not self._first:
            self._first = [torch.zeros_like(w) for w in weights]
            self._square = [torch.zeros_like(w) for w in weights]
            self._mean = [torch.zeros_like(w) for w in weights]
        self._step += 1
        left = (self.steps - self._step + 1) / max(1.0, self.decay * self.steps)
        rate = self.rate * min(1.0, left)
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if self.kind == "sgd":
                move = gradient
            else:
                self._first[i].lerp_(gradient, 1 - self.momentum)
                move = self._first[i] / (1 - self.momentum**self._step)
            if self.kind.startswith("adam"):
                self._square[i].lerp_(gradient.square(), 1 - self.second)
                square = self._square[i] / (1 - self.second**self._step)
                if self.kind == "adam-corrected":
                    square = (square - self.noise_variance).clamp(min=0.05 * self.noise_variance)
                move = move / (square.sqrt() + 1e-12)
            weight.sub_(move, alpha=rate)
            self._mean[i].lerp_(weight, 1 - self.average)

    def averaged(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights to use: the average of iterates, its zero start corrected, or the last iterate."""
        if not self.average:
            return [weight.detach().clone() for weight in weights]
        return [mean / (1 - self.average**self._step) for mean in self._mean]


def perplexity_free_loss(losses: Tensor) -> float:
    """Mean of token losses, with a check that training has not diverged."""
    value = float(losses.mean())
    if not math.isfinite(value):
        raise FloatingPointError("the loss is not finite: training diverged")
    return value
