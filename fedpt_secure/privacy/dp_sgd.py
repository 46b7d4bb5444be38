"""DP-SGD on a client's own records (Abadi et al. 2016).

Two things differ from Opacus's defaults, because they carry the proof; a third, each example's loss, is in
`privacy.examples`:

- The divisor of the noised sum is a public constant. Opacus divides by a function of the data set's size (its
  issues 571 and 819), which a neighbouring data set changes.
- Noise and sampling come from a `NoiseSource`, by default AES-256-CTR under a key of the operating system. Noise is
  drawn, added and kept in double precision: cast to single, a sum of few float32 gradients plus noise would stand on a
  grid that tells the data sets apart (Mironov 2012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.clipped_sum import clipped_sum
from fedpt_secure.privacy.examples import SampledPositions, SmallExample, drawn_classes
from fedpt_secure.privacy.noise import NoiseSource


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
        positions: most loss tokens of an example that a step looks at, chosen anew in each; all of them if None.
        classes: that a step's softmax is over, drawn anew in each (`lm.output_classes`); all of them if None.
    """

    steps: int
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    normaliser: float
    learning_rate: float
    positions: int | None = None
    classes: int | None = None


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
    part: TrainedPart = WHOLE,
) -> LocalUpdate:
    """Take noisy steps from the adapter that is loaded; the adapter is put back before returning.

    Args:
        part: what is trained, a public choice; elsewhere the update is 0 whatever the data are, and needs no noise.

    Raises:
        PrivacyError: settings that are not a mechanism (no clipping, rate outside (0, 1], ...).
    """
    _check(settings)
    before = small.adapter_vector()
    moved = np.zeros(small.dimension)
    try:
        for _ in range(settings.steps):
            chosen = np.flatnonzero(noise.bernoulli(len(examples), probability=settings.sampling_rate))
            total = clipped_sum(
                small,
                [examples[int(index)] for index in chosen],
                clip_norm=settings.clip_norm,
                positions=SampledPositions.draw(settings.positions, noise),
                classes=drawn_classes(small, settings.classes, noise),
                part=part,
            )
            # Also where nobody was sampled: the step must look like any other, noise and all.
            noised = total.vector + noise.gaussian(
                small.dimension, standard_deviation=settings.noise_multiplier * settings.clip_norm
            )
            if part != WHOLE:
                noised *= small.coordinates(part)
            moved -= settings.learning_rate / settings.normaliser * noised
            small.load_adapter_vector((before + moved).astype(np.float32))
    finally:
        small.load_adapter_vector(before)
    return LocalUpdate(vector=moved, steps=settings.steps)


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
    if settings.positions is not None and settings.positions < 1:
        raise PrivacyError(f"{settings.positions} positions: at least one is needed")
    if settings.steps < 1:
        raise PrivacyError(f"{settings.steps} steps: at least one is needed")
