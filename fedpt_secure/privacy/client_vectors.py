"""What a client's data contributes to a secure sum, in clip norms, before noise: the input of a `RingMechanism`.

In both modes a *unit*'s part has an L2 norm of at most 1, or of `QuantileClipping.unit_norm` where the clip norm adapts
and the unit's indicator travels along as the last coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.adaptive_clipping import QuantileClipping
from fedpt_secure.privacy.clipped_sum import clipped_sum
from fedpt_secure.privacy.examples import SampledPositions, SmallExample, drawn_classes
from fedpt_secure.privacy.noise import NoiseSource

FloatArray = npt.NDArray[np.float64]

_LARGEST_ENTRY = float(np.finfo(np.float32).max)


def sampled_gradient_sum(
    small: SmallLM,
    examples: Sequence[SmallExample],
    *,
    sampling_rate: float,
    clip_norm: float,
    noise: NoiseSource,
    quantile: QuantileClipping | None = None,
    positions: int | None = None,
    classes: int | None = None,
    part: TrainedPart = WHOLE,
) -> FloatArray:
    """Mode `distributed`: the sum of clipped gradients over a Poisson sample; the unit is a record.

    Args:
        sampling_rate: public probability with which each record takes part, independently.
        positions: most loss tokens of a record that are looked at, chosen by the client; all of them if None.
        classes: that the softmax is over, drawn by the client (`lm.output_classes`); all of them if None.
        part: what is trained, a public choice; the vector is 0 elsewhere.

    Returns [d], or [d + 1] with the indicators' sum last. **Private.**
    """
    chosen = np.flatnonzero(noise.bernoulli(len(examples), probability=sampling_rate))
    result = clipped_sum(
        small,
        [examples[int(index)] for index in chosen],
        clip_norm=clip_norm,
        positions=SampledPositions.draw(positions, noise),
        classes=drawn_classes(small, classes, noise),
        part=part,
    )
    return _with_indicator(result.vector / clip_norm, result.norms, clip_norm, quantile)


def clipped_client_update(
    small: SmallLM,
    examples: Sequence[SmallExample],
    *,
    sampling_rate: float,
    steps: int,
    learning_rate: float,
    clip_norm: float,
    noise: NoiseSource,
    quantile: QuantileClipping | None = None,
    positions: int | None = None,
    classes: int | None = None,
    part: TrainedPart = WHOLE,
) -> FloatArray:
    """Mode `client`: the client's whole update after full-batch gradient steps, clipped; the unit is the client.

    The client throws a coin for itself and contributes nothing where it fails. It trains all the same, and noises the
    zeros: nobody, the server included, may tell who contributed, or the sampling would not amplify the promise.

    The mean over its own records needs no public constant here: whatever training did, the update is clipped as one.
    An update that float32 cannot hold counts as zero. A client without records contributes nothing, no indicator
    either: it is the neighbour that a client with records is compared with.

    Args:
        sampling_rate: public probability with which the client contributes.
        positions: most loss tokens of a record that a step looks at, chosen anew in each; all of them if None.
        classes: that a step's softmax is over, drawn anew in each; all of them if None.
        part: what is trained, a public choice; the vector is 0 elsewhere.

    Returns [d], or [d + 1] with the indicator last. **Private.**
    """
    before = small.adapter_vector()
    moved = np.zeros(small.dimension)
    try:
        for _ in range(steps):
            total = clipped_sum(
                small,
                examples,
                clip_norm=math.inf,
                positions=SampledPositions.draw(positions, noise),
                classes=drawn_classes(small, classes, noise),
                part=part,
            )
            moved -= learning_rate / max(1, len(examples)) * total.vector
            if not np.abs(before + moved).max() <= _LARGEST_ENTRY:
                moved = np.zeros(small.dimension)
                break
            small.load_adapter_vector((before + moved).astype(np.float32))
    finally:
        small.load_adapter_vector(before)
    norm = float(np.linalg.norm(moved))
    contributes = noise.bernoulli(1, probability=sampling_rate)[0] and len(examples) > 0
    vector = _with_indicator(moved / max(norm, clip_norm), np.array([norm]), clip_norm, quantile)
    return vector if contributes else np.zeros_like(vector)


def _with_indicator(
    vector: FloatArray, norms: FloatArray, clip_norm: float, quantile: QuantileClipping | None
) -> FloatArray:
    return vector if quantile is None else np.append(vector, quantile.coordinate(norms, clip_norm))
