"""Opacus's two ways to per-example clipping, behind the same interface: an independent check of `privacy.bookkeeping`,
and what it is measured against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.bookkeeping import ExampleGradients
from fedpt_secure.privacy.examples import SampledPositions, SmallExample, example_losses

ClippedParts = Callable[[Sequence[SmallExample]], tuple[torch.Tensor, npt.NDArray[np.float64]]]
"""A batch's sum of clipped gradients, `[d]`, and the norms before clipping, `[batch]`."""


@contextmanager
def hook_gradients(small: SmallLM, *, positions: SampledPositions | None = None) -> Iterator[ExampleGradients]:
    """Gradients that `GradSampleHooks` materialises in one backward pass."""
    hooks = GradSampleHooks(small.model, loss_reduction="sum")

    def compute(batch: Sequence[SmallExample]) -> torch.Tensor:
        _backward(example_losses(small, batch, positions=positions).sum())
        samples = [parameter.grad_sample.cpu() for parameter in small.trainable]  # type: ignore[attr-defined]
        for parameter in small.trainable:
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return torch.cat(small.in_units(samples), dim=1)

    with _training(small, hooks):
        yield compute


@contextmanager
def ghost_sums(
    small: SmallLM, scales: Callable[[torch.Tensor], torch.Tensor], *, positions: SampledPositions | None = None
) -> Iterator[ClippedParts]:
    """Ghost clipping (Li et al. 2022): norms from Gram matrices, then a second backward pass of the scaled losses.

    Args:
        scales: factor for each example from the norms, 0 where the norm is not finite.
    """
    # The norm in its arguments scales nothing here: the scaling is `scales`.
    hooks = GradSampleHooksFastGradientClipping(small.model, loss_reduction="sum", max_grad_norm=1.0)

    def compute(batch: Sequence[SmallExample]) -> tuple[torch.Tensor, npt.NDArray[np.float64]]:
        losses = example_losses(small, batch, positions=positions)
        _backward(losses.sum(), retain_graph=True)
        norms = hooks.get_norm_sample().detach().double().cpu().nan_to_num(nan=torch.inf)
        kept = [example for example, norm in zip(batch, norms.tolist(), strict=True) if np.isfinite(norm)]
        for parameter in small.trainable:
            parameter.grad = None
        if len(kept) < len(batch):
            # A loss times 0 still sends NaN down the backward pass: the others are computed again, without it.
            part = compute(kept)[0] if kept else torch.zeros(small.dimension)
            return part, norms.numpy()
        hooks.disable_hooks()
        _backward((losses * scales(norms).to(losses)).sum())
        hooks.enable_hooks()
        part = torch.cat([_take_gradient(parameter) for parameter in small.trainable])
        return part, norms.numpy()

    with _training(small, hooks):
        yield compute


@contextmanager
def _training(small: SmallLM, hooks: GradSampleHooks) -> Iterator[None]:
    # Opacus records activations in training mode only; without dropout the mode changes nothing else.
    small.model.train()
    try:
        yield
    finally:
        hooks.cleanup()
        small.model.eval()
        for parameter in small.trainable:
            parameter.grad = None


def _take_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    parameter.grad = None
    return torch.zeros(parameter.numel()) if gradient is None else gradient.detach().flatten().cpu()


def _backward(loss: torch.Tensor, *, retain_graph: bool = False) -> None:
    with warnings.catch_warnings():
        # The lowest adapter's input needs no gradient, because everything below it is frozen; that is meant.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        torch.autograd.backward(loss, retain_graph=retain_graph)
