"""The sum of clipped per-example gradients: all that a Gaussian mechanism on examples asks of training.

Noise, sampling, rounding and accounting are the mechanisms' own; this is the part of them that touches records.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.examples import SmallExample, example_losses

PHYSICAL_BATCH = 32
"""Examples per forward pass; bounds memory, does not touch the mathematics."""

_NORM_ROUNDING = 1e-9
"""Relative error a computed norm may have: far above that of a float64 sum of squares over 1e6 entries."""


@dataclass(frozen=True, slots=True)
class ClippedSum:
    """The un-noised sum over a sample, and what the sum hides.

    **Private**, both of them: neither may leave the client before a mechanism has added its noise.

    Attributes:
        vector: sum of the clipped gradients, float64 `[d]`, in the order of `SmallLM.adapter_vector`.
        norms: L2 norm of each example's gradient before clipping, float64 `[n]`, in the order of the examples; inf
            where the gradient is not finite. Adaptive clipping (Andrew et al. 2021) noises a count over them.
    """

    vector: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]


def clipped_sum(small: SmallLM, examples: Sequence[SmallExample], *, clip_norm: float) -> ClippedSum:
    """Sum the examples' gradients at the loaded adapter, each scaled down to `clip_norm` where it is longer.

    **Guarantees** Every term's L2 norm is at most `clip_norm`, whatever the weights and the example: lengths and
    products are float64, and the norm is rounded up. A gradient that is not finite counts as zero: clipping cannot
    bound it, and no noise hides a NaN; weights that overflow on one record would otherwise be a way to ask for it.
    No examples give the zero vector.

    **Assumptions** An example's gradient is a function of the weights and of that example.

    Raises:
        PrivacyError: `clip_norm` is not a finite number above 0.
    """
    if not (np.isfinite(clip_norm) and clip_norm > 0):
        raise PrivacyError(f"clip_norm is {clip_norm}, must be a finite number above 0")
    total = torch.zeros(small.dimension, dtype=torch.float64)
    norms = np.zeros(len(examples))
    with _opacus_hooks(small):
        for chosen in _physical_batches(examples):
            _backward(example_losses(small, [examples[index] for index in chosen]).sum())
            norms[chosen] = _add_clipped(total, _take_gradients(small), clip_norm)
    return ClippedSum(total.numpy(), norms)


@contextmanager
def _opacus_hooks(small: SmallLM) -> Iterator[None]:
    hooks = GradSampleHooks(small.model, loss_reduction="sum")
    # Opacus records activations in training mode only; without dropout the mode changes nothing else.
    small.model.train()
    try:
        yield
    finally:
        hooks.cleanup()
        small.model.eval()


def _backward(loss: torch.Tensor) -> None:
    with warnings.catch_warnings():
        # The lowest adapter's input needs no gradient, because everything below it is frozen; that is meant.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        torch.autograd.backward(loss)


def _take_gradients(small: SmallLM) -> torch.Tensor:
    """The physical batch's per-example gradients, float32 `[batch, d]`; Opacus forgets them."""
    samples = []
    for parameter in small.trainable:
        samples.append(parameter.grad_sample.flatten(1).cpu())  # type: ignore[attr-defined]  # Opacus's attribute
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
    return torch.cat(samples, dim=1)


def _add_clipped(total: torch.Tensor, gradients: torch.Tensor, clip_norm: float) -> npt.NDArray[np.float64]:
    """Add each row's clipped gradient to `total`, `[d]`; the norms before clipping, `[batch]`."""
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64).nan_to_num(nan=torch.inf).numpy()
    for row, norm in zip(gradients, norms.tolist(), strict=True):
        if np.isfinite(norm):
            longest = norm * (1 + _NORM_ROUNDING)
            total.add_(row, alpha=1.0 if longest <= clip_norm else clip_norm / longest)
    return np.asarray(norms)


def _physical_batches(examples: Sequence[SmallExample]) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of each physical batch, like lengths together, so that little is padded."""
    order = np.argsort([len(example.ids) for example in examples], kind="stable")
    for start in range(0, len(order), PHYSICAL_BATCH):
        yield order[start : start + PHYSICAL_BATCH]
