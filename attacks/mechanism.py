"""Is the mechanism that clients run as noisy as claimed? Asked of the code of a real round, with data that is known.

An observation is everything the claim is about (`RoundMechanism.release` and `decode`): in mode `local` one client's
release, bare; in the others the ring's sum over as few honest survivors as the calibration counts on. One step at rate
1 is observed: sampling and composition are the accountant's. Units are clip norms.

- `noise_scale`: clients without records release noise alone. Its sum of squares over the claimed variance is chi-square
  with as many degrees of freedom as there are numbers; too small a sum is a violation.
- `two_worlds`: a record in the worst direction, there or not; two thresholds fixed beforehand err at some rates. Their
  Clopper-Pearson bounds give mu_lb = Phi^-1(1 - FPR_ub) - Phi^-1(FNR_ub), which must not pass the mu = 1 / noise
  multiplier of the claim (a Gaussian mechanism is mu-Gaussian-DP; Dong, Roth and Su 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, norm

from fedpt_secure.attacks.operating_points import clopper_pearson, histogram
from fedpt_secure.config import RunConfig
from fedpt_secure.federation.mechanisms import (
    LocalMechanism,
    RingNoiseMechanism,
    RoundMechanism,
    build_mechanism,
    honest_survivors,
)
from fedpt_secure.federation.terms import client_randomness
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SmallExample, clipped_sum

FloatArray = npt.NDArray[np.float64]
_SAMPLED = ("sampled_positions", "output_classes")
"""What a step looks at only a sample of."""


@dataclass(frozen=True, slots=True)
class Observer:
    """A run's mechanism, and what its strongest adversary sees of one step.

    Attributes:
        small: the run's small LM; releases are taken at a fresh adapter.
        mechanism: built with the noise that the run's settings call for.
        clients: whose shares of noise are in an observation.
    """

    config: RunConfig
    small: SmallLM
    mechanism: RoundMechanism
    clients: int

    @classmethod
    def of(cls, config: RunConfig, small: SmallLM, *, noise_multiplier: float) -> Observer:
        """The run's mechanism, one step at rate 1 on all of a record's tokens, over the whole head."""
        one_step = config.model_copy(
            update={
                "privacy": config.privacy.model_copy(update={"sampling_rate": 1.0}),
                "training": config.training.model_copy(update=dict.fromkeys(_SAMPLED, None) | {"local_steps": 1}),
            }
        )
        mechanism = build_mechanism(one_step, noise_multiplier=noise_multiplier, dimension=small.dimension)
        clients = 1 if isinstance(mechanism, LocalMechanism) else honest_survivors(one_step)
        return cls(one_step, small, mechanism, clients)

    @property
    def sensitivity(self) -> float:
        """Of the mechanism, in clip norms: what a noise multiplier of 1 is as a standard deviation."""
        if isinstance(self.mechanism, RingNoiseMechanism):
            return float(self.mechanism.ring.sensitivity / self.mechanism.ring.encoding.scale)
        return 1.0

    def observe(self, examples: Sequence[SmallExample], trial: int) -> FloatArray:
        """The noised sum in clip norms `[d]`, one client holding the examples and the others nothing."""
        privacy, training = self.config.privacy, self.config.training
        before = self.small.adapter_vector()
        self.small.load_adapter_vector(np.zeros_like(before))
        try:
            released = [
                self.mechanism.release(
                    self.small,
                    examples if index == 0 else (),
                    clip_norm=privacy.clip_norm,
                    noise=client_randomness(self.config, f"observed {index}").noise(trial),
                )
                for index in range(self.clients)
            ]
        finally:
            self.small.load_adapter_vector(before)
        if isinstance(self.mechanism, LocalMechanism):
            return np.asarray(released[0] * -training.normaliser / (training.local_learning_rate * privacy.clip_norm))
        total = released[0].copy()
        for vector in released[1:]:
            total += vector
        mean = self.mechanism.decode(total, survivors=self.clients, clip_norm=privacy.clip_norm).mean_update
        if privacy.mode == "client":
            return np.asarray(mean * self.clients / privacy.clip_norm)
        scale = -training.normaliser * self.clients / (training.local_learning_rate * privacy.clip_norm)
        return np.asarray(mean * scale)


def noise_scale(
    observer: Observer, *, claimed: float, rounds: int, alpha: float, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare the spread of noise alone with the claimed noise multiplier.

    Returns the fields of docs/audits.md, and `violation`: the spread is below its 1 - alpha interval. Noise above it is
    no violation of a promise.
    """
    squares, count = 0.0, 0
    for trial in range(rounds):
        noise = observer.observe((), trial)
        squares, count = squares + float((noise**2).sum()), count + noise.size
        advance()
    deviation = claimed * observer.sensitivity
    low, high = (deviation * math.sqrt(float(chi2.ppf(q, count)) / count) for q in (alpha, 1 - alpha))
    measured = math.sqrt(squares / count)
    return {
        "claimed_deviation": deviation,
        "measured_deviation": measured,
        "interval": [low, high],
        "values": count,
        "violation": measured < low,
    }


def two_worlds(
    observer: Observer,
    record: SmallExample,
    *,
    claimed: float,
    trials: int,
    alpha: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Tell apart a client with one record from one without any.

    Args:
        record: its gradient should be longer than the clip norm, or the worlds are closer than the claim allows.
        claimed: noise multiplier.
        trials: in each world.
    """
    direction = _direction(observer, record)
    without, present = np.empty(trials), np.empty(trials)
    for trial in range(trials):
        without[trial] = observer.observe((), 2 * trial) @ direction
        present[trial] = observer.observe((record,), 2 * trial + 1) @ direction
        advance()
    # Fixed beforehand, with half of alpha each: the best one for a clipped record, and one for a record that is not.
    found = max(
        (_bound(without, present, threshold, alpha=alpha / 2) for threshold in (0.5, 0.5 + 2 * claimed)),
        key=lambda item: item[0],
    )
    bound, threshold, wrong_in, wrong_out = found
    allowed = 1 / claimed
    return {
        "mu_claimed": allowed,
        "mu_lower_bound": max(0.0, bound),
        "trials": trials,
        "false_positives": _rate(wrong_in, trials),
        "false_negatives": _rate(wrong_out, trials),
        "threshold": threshold,
        "histogram": histogram(present, without),
        "violation": bound > allowed,
    }


def longest_gradient(small: SmallLM, examples: Sequence[SmallExample]) -> tuple[SmallExample, float]:
    """Of some examples, the one whose gradient at a fresh adapter is longest, and its length."""
    before = small.adapter_vector()
    small.load_adapter_vector(np.zeros_like(before))
    try:
        lengths = [float(np.linalg.norm(_gradient(small, example))) for example in examples]
    finally:
        small.load_adapter_vector(before)
    best = int(np.argmax(lengths))
    return examples[best], lengths[best]


def _direction(observer: Observer, record: SmallExample) -> FloatArray:
    """Where the record moves the sum to, of length 1: the gradient's own, or in mode `client` the step's."""
    small = observer.small
    before = small.adapter_vector()
    small.load_adapter_vector(np.zeros_like(before))
    try:
        gradient = _gradient(small, record)
    finally:
        small.load_adapter_vector(before)
    sign = -1.0 if observer.config.privacy.mode == "client" else 1.0
    return np.asarray(sign * gradient / np.linalg.norm(gradient))


def _gradient(small: SmallLM, example: SmallExample) -> FloatArray:
    return clipped_sum(small, [example], clip_norm=math.inf).vector


def _bound(
    without: FloatArray, present: FloatArray, threshold: float, *, alpha: float
) -> tuple[float, float, int, int]:
    """Lower bound of mu at a threshold, which misses with a chance of at most alpha; the threshold; both errors."""
    trials = len(without)
    wrong_in, wrong_out = int((without > threshold).sum()), int((present <= threshold).sum())
    # The upper ends of two-sided intervals: each misses with half of alpha.
    highest_fpr, highest_fnr = (clopper_pearson(count, trials, alpha=alpha)[1] for count in (wrong_in, wrong_out))
    bound = float(norm.ppf(1 - highest_fpr) - norm.ppf(highest_fnr)) if max(highest_fpr, highest_fnr) < 1 else 0.0
    return bound, threshold, wrong_in, wrong_out


def _rate(count: int, trials: int) -> dict[str, float]:
    low, high = clopper_pearson(count, trials, alpha=0.05)
    return {"value": count / trials, "low": low, "high": high}
