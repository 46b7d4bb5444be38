"""DP-SGD on a client's own records (Abadi et al. 2016), with Opacus doing the per-example gradients.

Three things differ from Opacus's defaults, because they carry the proof:

- The divisor of the noised sum is a public constant. Opacus divides by a function of the data set's size (its
  issues 571 and 819), which a neighbouring data set changes.
- An example's loss is the mean over its own tokens, never over the batch's, so that its gradient does not depend on
  the other examples.
- Noise and sampling come from a `NoiseSource`, by default AES-256-CTR under a key of the operating system. Noise is
  drawn, added and kept in double precision: cast to single, a sum of few float32 gradients plus noise would stand on a
  grid that tells the data sets apart (Mironov 2012).
- A gradient that is not finite counts as zero. Clipping cannot bound it, and no noise hides a NaN; weights that
  overflow on one record would otherwise be a way to ask for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch.nn.functional import cross_entropy

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.noise import NoiseSource

PHYSICAL_BATCH = 32
"""Examples per forward pass; bounds memory, does not touch the mathematics."""


@dataclass(frozen=True, slots=True)
class SmallExample:
    """One record in the small LM's vocabulary.

    Attributes:
        ids: token ids, the separator first.
        loss_from: first position that is predicted with loss, at least 1 and below `len(ids)`.
    """

    ids: tuple[int, ...]
    loss_from: int


@dataclass(frozen=True, slots=True)
class DpSgdSettings:
    """The public constants of a client's DP-SGD.

    Attributes:
        steps: noisy steps to take.
        sampling_rate: probability with which each example takes part in a step, independently.
        clip_norm: L2 norm an example's gradient is clipped to; the sensitivity of a step's sum.
        noise_multiplier: noise standard deviation over `clip_norm`; 0 is not private.
        normaliser: constant that the noised sum is divided by; must not be derived from the data.
        learning_rate: of the plain SGD step.
    """

    steps: int
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    normaliser: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class LocalUpdate:
    """What local training moved: `vector` = the sum of the steps, float64 `[d]`.

    **Guarantees** With noise multiplier sigma > 0 the vector is the output of `steps` subsampled Gaussian
    mechanisms on the client's examples, add-or-remove-one, and post-processing of them.
    """

    vector: npt.NDArray[np.float64]
    steps: int


def train_locally(
    small: SmallLM,
    examples: Sequence[SmallExample],
    settings: DpSgdSettings,
    *,
    noise: NoiseSource,
) -> LocalUpdate:
    """Take noisy steps from the adapter that is loaded; the adapter is put back before returning.

    Raises:
        PrivacyError: settings that are not a mechanism (no clipping, rate outside (0, 1], ...).
    """
    _check(settings)
    before = small.adapter_vector()
    moved = np.zeros(small.dimension)
    clipper = _Clipper(small.trainable, clip_norm=settings.clip_norm)
    hooks = GradSampleHooks(small.model, loss_reduction="sum")
    # Opacus records activations in training mode only; without dropout the mode changes nothing else.
    small.model.train()
    try:
        for _ in range(settings.steps):
            chosen = np.flatnonzero(noise.bernoulli(len(examples), probability=settings.sampling_rate))
            for batch in _physical_batches([examples[int(index)] for index in chosen]):
                _backward(example_losses(small, batch).sum())
                clipper.clip_and_accumulate()
            # Also where nobody was sampled: the step must look like any other, noise and all.
            noised = clipper.take_sum() + noise.gaussian(
                small.dimension, standard_deviation=settings.noise_multiplier * settings.clip_norm
            )
            moved -= settings.learning_rate / settings.normaliser * noised
            small.load_adapter_vector((before + moved).astype(np.float32))
    finally:
        hooks.cleanup()
        small.model.eval()
        small.load_adapter_vector(before)
    return LocalUpdate(vector=moved, steps=settings.steps)


def example_losses(small: SmallLM, batch: Sequence[SmallExample]) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of each example's own loss tokens, `[len(batch)]`."""
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


def _backward(loss: torch.Tensor) -> None:
    with warnings.catch_warnings():
        # The lowest adapter's input needs no gradient, because everything below it is frozen; that is meant.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        torch.autograd.backward(loss)


class _Clipper(DPOptimizer):
    """Opacus's per-example clipping and summing; the noise and the step are ours."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, clip_norm: float) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    def clip_and_accumulate(self) -> None:
        """Add the physical batch's clipped gradients to the sum, and forget the gradients."""
        samples = self.grad_samples
        finite = torch.stack([sample.flatten(1).isfinite().all(1) for sample in samples]).all(0)
        # The norm too: finite entries can overflow when squared.
        finite &= torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0).isfinite()
        for parameter, sample in zip(self.params, samples, strict=True):
            shape = (-1, *[1] * (sample.dim() - 1))
            parameter.grad_sample = torch.where(finite.view(shape), sample, 0.0)
        super().clip_and_accumulate()
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.grad = None

    def take_sum(self) -> npt.NDArray[np.float64]:
        """The sum of clipped gradients since the last call, `[d]`; zero if there was no batch."""
        parts = []
        for parameter in self.params:
            total = parameter.summed_grad
            parts.append(torch.zeros(parameter.numel()) if total is None else total.detach().reshape(-1).cpu())
            parameter.summed_grad = None
        return torch.cat(parts).double().numpy()


def _physical_batches(examples: list[SmallExample]) -> Iterator[list[SmallExample]]:
    """Split a logical batch, like lengths together, so that little is padded."""
    examples = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(examples), PHYSICAL_BATCH):
        yield examples[start : start + PHYSICAL_BATCH]


def _check(settings: DpSgdSettings) -> None:
    positive = {
        "clip_norm": settings.clip_norm,
        "normaliser": settings.normaliser,
        "learning_rate": settings.learning_rate,
    }
    for name, value in positive.items():
        if not (np.isfinite(value) and value > 0):
            raise PrivacyError(f"{name} is {value}, must be a finite number above 0")
    if not 0 < settings.sampling_rate <= 1:
        raise PrivacyError(f"sampling rate {settings.sampling_rate} is not in (0, 1]")
    if not (np.isfinite(settings.noise_multiplier) and settings.noise_multiplier >= 0):
        raise PrivacyError(f"noise multiplier {settings.noise_multiplier} is not a finite number of 0 or more")
    if settings.steps < 1:
        raise PrivacyError(f"{settings.steps} steps: at least one is needed")
