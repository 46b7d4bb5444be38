"""The privacy mechanisms as a round uses them: what a client releases, and what the server makes of the sum.

Both sides build the same mechanism from the configuration and the population's public numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.config import RunConfig, withstood
from fedpt_secure.crypto import FixedPointEncoding, RandomBytes
from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import (
    DpSgdSettings,
    GaussianSteps,
    NoiseSource,
    QuantileClipping,
    RingMechanism,
    SmallExample,
    clipped_client_update,
    sampled_gradient_sum,
    train_locally,
)

RingVector = npt.NDArray[np.unsignedinteger]
FloatArray = npt.NDArray[np.float64]

COORDINATE_BOUND = 16.0
"""Mode `distributed`: most that one client's sum may hold in one coordinate, in clip norms; more is cut off."""
INDICATOR_WEIGHT = 0.2
"""Of a unit's indicator under adaptive clipping, in clip norms: half a per cent more noise at the median."""
CLIP_RANGE = 100.0
"""Adaptive clipping stays within this factor of the first clip norm."""


@dataclass(frozen=True, slots=True)
class DecodedSum:
    """The mean update `[d]`, and the clip norm of the next round."""

    mean_update: FloatArray
    clip_norm: float


class RoundMechanism(ABC):
    """One round's release of a client, the same for every round of a run.

    Attributes:
        cost: what a round costs a client's records (in mode `client`: the client) at worst.
        resendable: whether an interrupted round may send the same release again. Not where the noise of several
            clients adds up: two sums over different survivors would differ by less noise than was promised.
        vector_length: of the ring vectors.
    """

    cost: GaussianSteps
    resendable: bool
    vector_length: int

    @abstractmethod
    def release(
        self,
        small: SmallLM,
        examples: Sequence[SmallExample],
        *,
        clip_norm: float,
        noise: NoiseSource,
        part: TrainedPart = WHOLE,
    ) -> npt.NDArray[Any]:
        """The client's noised release at the adapter that is loaded; the adapter is put back.

        Args:
            part: what the client trains, by the public plan.
        """

    @abstractmethod
    def to_ring(self, released: npt.NDArray[Any], random_bytes: RandomBytes) -> RingVector:
        """The release as the vector that secure aggregation sums."""

    @abstractmethod
    def decode(
        self, total: RingVector, *, survivors: int, clip_norm: float, contributors: FloatArray | None = None
    ) -> DecodedSum:
        """What the server learns from the sum over the survivors.

        Args:
            contributors: how many survivors train each entry, `[d]`; all of them if None. Entries that nobody trains
                are 0 in the mean update.
        """


class LocalMechanism(RoundMechanism):
    """Mode `local`: DP-SGD with enough noise at each client; the ring only carries the result."""

    resendable = True

    def __init__(self, config: RunConfig, *, noise_multiplier: float, dimension: int) -> None:
        privacy, training, federation = config.privacy, config.training, config.federation
        self.cost = GaussianSteps(noise_multiplier, privacy.sampling_rate, training.local_steps)
        self.vector_length = dimension
        self._settings = DpSgdSettings(
            steps=training.local_steps,
            sampling_rate=privacy.sampling_rate,
            clip_norm=privacy.clip_norm,
            noise_multiplier=noise_multiplier,
            normaliser=training.normaliser,
            learning_rate=training.local_learning_rate,
            positions=training.sampled_positions,
            classes=training.output_classes,
        )
        self._encoding = FixedPointEncoding(
            ring_bits=federation.ring_bits, bound=training.update_bound, cohort=federation.agreed_cohort
        )

    def release(
        self,
        small: SmallLM,
        examples: Sequence[SmallExample],
        *,
        clip_norm: float,
        noise: NoiseSource,
        part: TrainedPart = WHOLE,
    ) -> FloatArray:
        return train_locally(small, examples, self._settings, noise=noise, part=part).vector

    def to_ring(self, released: npt.NDArray[Any], random_bytes: RandomBytes) -> RingVector:
        return self._encoding.encode(released.astype(np.float64), random_bytes=random_bytes)

    def decode(
        self, total: RingVector, *, survivors: int, clip_norm: float, contributors: FloatArray | None = None
    ) -> DecodedSum:
        mean = _per_contributor(self._encoding.decode_sum(total, survivors=survivors), survivors, contributors)
        return DecodedSum(mean, clip_norm)


class RingNoiseMechanism(RoundMechanism):
    """Modes `distributed` and `client`: the honest survivors together have enough noise, and only their sum is seen.

    Attributes:
        ring: the mechanism in the ring, which knows how much noise how many honest shares make.
    """

    resendable = False

    def __init__(self, config: RunConfig, *, noise_multiplier: float, dimension: int) -> None:
        privacy = config.privacy
        self._config = config
        self._quantile = quantile_clipping(config)
        self._by_client = privacy.mode == "client"
        self.vector_length = dimension + (self._quantile is not None)
        self.ring = RingMechanism.plan(
            noise_multiplier=noise_multiplier,
            honest_shares=honest_survivors(config),
            cohort=config.federation.agreed_cohort,
            dimension=self.vector_length,
            coordinate_bound=1.0 if self._by_client else COORDINATE_BOUND,
            ring_bits=config.federation.ring_bits,
            unit_norm=1.0 if self._quantile is None else self._quantile.unit_norm,
        )
        self.cost = GaussianSteps(self.ring.noise_multiplier(self.ring.honest_shares), privacy.sampling_rate, steps=1)

    def release(
        self,
        small: SmallLM,
        examples: Sequence[SmallExample],
        *,
        clip_norm: float,
        noise: NoiseSource,
        part: TrainedPart = WHOLE,
    ) -> RingVector:
        privacy, training = self._config.privacy, self._config.training
        if self._by_client:
            vector = clipped_client_update(
                small,
                examples,
                sampling_rate=privacy.sampling_rate,
                steps=training.local_steps,
                learning_rate=training.local_learning_rate,
                clip_norm=clip_norm,
                noise=noise,
                quantile=self._quantile,
                positions=training.sampled_positions,
                classes=training.output_classes,
                part=part,
            )
        else:
            vector = sampled_gradient_sum(
                small,
                examples,
                sampling_rate=privacy.sampling_rate,
                clip_norm=clip_norm,
                noise=noise,
                quantile=self._quantile,
                positions=training.sampled_positions,
                classes=training.output_classes,
                part=part,
            )
        return self.ring.encode(vector, noise)

    def to_ring(self, released: npt.NDArray[Any], random_bytes: RandomBytes) -> RingVector:
        return released  # `release` made it in the ring already

    def decode(
        self, total: RingVector, *, survivors: int, clip_norm: float, contributors: FloatArray | None = None
    ) -> DecodedSum:
        training = self._config.training
        decoded = self.ring.decode(total)
        units = self._config.privacy.sampling_rate  # that a survivor is expected to contribute
        if self._by_client:
            step = clip_norm / units
        else:
            units *= training.normaliser
            step = -training.local_learning_rate * clip_norm / units
        if self._quantile is None:
            return DecodedSum(step * _per_contributor(decoded, survivors, contributors), clip_norm)
        units *= survivors
        mean = _per_contributor(decoded[:-1], survivors, contributors)
        return DecodedSum(
            step * mean, self._quantile.next_clip_norm(clip_norm, float(decoded[-1]), expected_units=units)
        )


def _per_contributor(total: FloatArray, survivors: int, contributors: FloatArray | None) -> FloatArray:
    """A sum over the survivors, divided entry by entry by how many of them train it; 0 where nobody does."""
    if contributors is None:
        return total / survivors
    return np.divide(total, contributors, out=np.zeros_like(total), where=contributors > 0)


def build_mechanism(config: RunConfig, *, noise_multiplier: float, dimension: int) -> RoundMechanism:
    """The run's mechanism.

    Args:
        noise_multiplier: calibrated over all rounds; 0 for none.
        dimension: trained parameters.

    Raises:
        PrivacyError: the ring is too small, or no survivor is sure to be honest.
    """
    if config.privacy.mode == "local":
        return LocalMechanism(config, noise_multiplier=noise_multiplier, dimension=dimension)
    return RingNoiseMechanism(config, noise_multiplier=noise_multiplier, dimension=dimension)


def honest_survivors(config: RunConfig) -> int:
    """Survivors of any opened round who certainly do not collude: the fewest survivors less the most colluders.

    Raises:
        PrivacyError: there need not be any, or secure aggregation does not withstand so many colluders.
    """
    federation = config.federation
    if config.corrupt_clients > (most := withstood(federation.agreed_cohort)):
        raise PrivacyError(
            f"{config.corrupt_clients} of {federation.agreed_cohort} clients may collude with the server, but against "
            f"a malicious one secure aggregation withstands {most}: with more, two sums can be opened whose difference "
            "has next to no noise",
            hint=f"--corrupt-fraction {math.floor(100 * most / federation.agreed_cohort) / 100:g} or less",
        )
    honest = federation.agreed_survivors - config.corrupt_clients
    if honest < 1:
        raise PrivacyError(
            f"{config.corrupt_clients} colluding clients of at least {federation.agreed_survivors} survivors leave "
            "nobody whose noise counts",
            hint="a larger --minimum-survivors, or a smaller --corrupt-fraction",
        )
    return honest


def quantile_clipping(config: RunConfig) -> QuantileClipping | None:
    """The rule by which the clip norm adapts, or None where it is fixed."""
    privacy = config.privacy
    if privacy.clipping == "fixed":
        return None
    return QuantileClipping(
        quantile=privacy.clip_quantile,
        learning_rate=privacy.clip_learning_rate,
        weight=INDICATOR_WEIGHT,
        smallest=privacy.clip_norm / CLIP_RANGE,
        largest=privacy.clip_norm * CLIP_RANGE,
    )
