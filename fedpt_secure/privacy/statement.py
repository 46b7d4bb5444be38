"""The privacy statement: the one object that every printed epsilon comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpt_secure.privacy.accounting import ACCOUNTANT, GaussianSteps, epsilon_spent, round_up

SCHEMA = "fedpt-secure/privacy/1"


@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """What is promised to whom, against whom, and under which assumptions.

    Attributes:
        epsilon: an upper bound over the clients, or None where nothing is promised.
        delta: the probability the promise does not cover.
        unit: what is protected.
        neighbouring: which two data sets must look alike.
        adversary: whom the promise holds against.
        mechanism: what was done to the data.
        accountant: how the number was computed.
        noise_multiplier, sampling_rate, steps: of the client that was used most.
        assumptions: what must be true for the promise to hold.
        not_covered: what it does not say.
        private: False where nothing is promised (no noise, or noise that anybody can recompute).
    """

    epsilon: float | None
    delta: float
    unit: str
    neighbouring: str
    adversary: str
    mechanism: str
    accountant: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]
    private: bool

    def to_json(self) -> dict[str, Any]:
        """The content of `privacy.json`."""
        return {"schema": SCHEMA, "claim": self.claim(), **dataclasses.asdict(self)}

    def claim(self) -> str:
        """The promise in one sentence."""
        if not self.private or self.epsilon is None:
            return "NOT PRIVATE: no differential privacy is promised."
        return (
            f"epsilon <= {self.epsilon} at delta = {self.delta} for each {self.unit}; neighbouring: "
            f"{self.neighbouring}; against {self.adversary}."
        )


def local_statement(
    histories: Mapping[str, Sequence[GaussianSteps]], *, delta: float, clip_norm: float, noise_is_private: bool
) -> PrivacyStatement:
    """The statement of mode `local` over what each client's ledger says was really spent.

    Each client's noise protects its own records, whoever else is honest; the run's epsilon is the largest.

    Args:
        histories: client id -> its releases in this run.
        noise_is_private: False for noise from a seed.
    """
    worst: tuple[GaussianSteps, ...] = ()
    epsilon = 0.0
    for history in {tuple(item) for item in histories.values()}:
        spent = epsilon_spent(history, delta=delta)
        if spent >= epsilon:
            epsilon, worst = spent, history
    private = noise_is_private and math.isfinite(epsilon)
    multiplier = min((item.noise_multiplier for item in worst), default=0.0)
    rate = max((item.sampling_rate for item in worst), default=0.0)
    steps = sum(item.steps for item in worst)
    return PrivacyStatement(
        epsilon=round_up(epsilon) if private else None,
        delta=delta,
        unit="single record of a client",
        neighbouring="add or remove one record of one client's prepared training set",
        adversary=(
            "anyone who sees all the client ever sends, bare: the server, other clients, all of them together, "
            "and whoever holds the released adapter or queries the proxy-tuned model"
        ),
        mechanism=(
            f"DP-SGD at each client: per-record gradients clipped to {clip_norm:g}, Gaussian noise of standard "
            f"deviation {multiplier:.4g} x {clip_norm:g} added by the client, each record in a step with "
            f"probability {rate:g} (Poisson), at most {steps} steps per client; sums divided by a public constant"
        ),
        accountant=ACCOUNTANT,
        noise_multiplier=multiplier,
        sampling_rate=rate,
        steps=steps,
        assumptions=(
            "the client's own device, code and random generator are honest",
            *(("nobody learns which records a step sampled",) if rate < 1 else ()),
            "which clients take part, and the prepared sets' boundaries, are not secret",
            "noise drawn, added and kept in double precision stands for real numbers",
        ),
        not_covered=(
            "one person's records in several conversations together: k records cost about k times epsilon",
            "the held-out figures of a report, which are averages over private records that were never trained on",
            "what the same data is used for elsewhere; the client's ledger counts only what it sees",
        ),
        private=private,
    )
