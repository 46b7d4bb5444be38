"""What privacy costs, before anything is trained: noise for an epsilon, or epsilon for a noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from fedpt_secure.config import SMALLEST_DELTA, PrivacyConfig, Settings, most_corrupt, withstood
from fedpt_secure.crypto import default_threshold
from fedpt_secure.errors import PrivacyError
from fedpt_secure.federation.mechanisms import COORDINATE_BOUND
from fedpt_secure.privacy import (
    GaussianSteps,
    Mode,
    PrivacyStatement,
    RingMechanism,
    calibrate_noise,
    epsilon_spent,
    local_statement,
    ring_statement,
)

TABLE_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Rows of every table, beside the one that was asked for."""
CURVE_POINTS = 13
_CURVE_EXCESS = 1e-3  # of epsilon: less than a line's width
_TOLERATED_FRACTION: float = PrivacyConfig.model_fields["corrupt_fraction"].default
_CLIP_NORM_IN_WORDS = "the clip norm"


class PlanConfig(Settings):
    """What `account` is asked. One of `epsilon` and `noise_multiplier` is given, and the other is the answer."""

    mode: Mode = "local"
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    noise_multiplier: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(ge=SMALLEST_DELTA, lt=1, allow_inf_nan=False)] = 1e-5
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    """Rounds that a client takes part in."""
    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Public chance that a record is in a step; in mode `client`, that a client of the cohort is in a round's sum."""
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Noised steps of a round, in mode `local`."""
    cohort: Annotated[int, Field(ge=3, le=100_000)] | None = None
    survivors: Annotated[int, Field(ge=2)] | None = None
    """Fewest whose sum is opened; default: the secret-sharing threshold, 2/3 of the cohort."""
    corrupt: Annotated[int, Field(ge=0)] | None = None
    """Most clients of a round that collude with the server; default: a tenth of the cohort."""
    parameters: Annotated[int, Field(ge=1, le=10**9)] = 18_432
    """Trained, which the noise is spread over; the default run's."""
    ring_bits: Annotated[int, Field(ge=16, le=32)] = 32
    records: Annotated[int, Field(ge=1)] | None = None
    """Of the largest client in mode `local`, of all in mode `distributed`; delta must be below one over it."""
    clients: Annotated[int, Field(ge=1)] | None = None
    """The same for mode `client`."""

    @model_validator(mode="after")
    def _fits_together(self) -> PlanConfig:
        problems = []
        if (self.epsilon is None) == (self.noise_multiplier is None):
            problems.append("give epsilon, to be told the noise, or noise_multiplier, to be told epsilon: one of them")
        of_cohorts = {name: getattr(self, name) for name in ("cohort", "survivors", "corrupt")}
        if self.mode == "local" and (given := [name for name, value in of_cohorts.items() if value is not None]):
            problems.append(f"{', '.join(given)}: in mode local a client's own noise suffices, whoever else takes part")
        if self.mode != "local" and self.cohort is None:
            problems.append(f"cohort is needed: in mode {self.mode} the noise is that of the honest survivors together")
        if self.mode != "local" and self.local_steps != 1:
            problems.append("local_steps: a round is one noised release in modes distributed and client")
        if self.cohort is not None and self.agreed_survivors > self.cohort:
            problems.append(f"survivors {self.agreed_survivors} is above the cohort of {self.cohort}")
        if self.mode == "client" and self.records is not None:
            problems.append("records: in mode client the unit is a client, so that clients is what counts")
        if self.mode != "client" and self.clients is not None:
            problems.append(f"clients: in mode {self.mode} the unit is a record, so that records is what counts")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def steps(self) -> int:
        """Noised releases of a client's data over all rounds."""
        return self.rounds * self.local_steps

    @property
    def agreed_survivors(self) -> int:
        """Fewest survivors of a round whose sum is opened."""
        return self.survivors or default_threshold(self.cohort or 0)

    @property
    def tolerated(self) -> int:
        """Most colluding clients of a round."""
        return most_corrupt(_TOLERATED_FRACTION, self.cohort or 0) if self.corrupt is None else self.corrupt

    @property
    def honest_survivors(self) -> int:
        """Fewest clients whose noise is in every opened sum and unknown to the adversary."""
        return self.agreed_survivors - self.tolerated


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One line of the table.

    Attributes:
        epsilon: asked for, or found.
        noise_multiplier: standard deviation over sensitivity, against the strongest adversary; None if no noise gives
            the epsilon here.
        share: standard deviation of what each client adds, in clip norms.
        gain: the sum's signal-to-noise ratio over that of `local`, where every client adds all of the noise itself.
        asked: the line the question was about.
    """

    epsilon: float
    noise_multiplier: float | None
    share: float | None
    gain: float | None
    asked: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the statement that a run of these numbers would make, and the table around it."""

    config: PlanConfig
    statement: PrivacyStatement
    rows: tuple[PlanRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The answer for programs; the statement as in `privacy.json`."""
        return {
            "question": self.config.model_dump(exclude_none=True),
            "statement": self.statement.to_json(),
            "rows": [
                {
                    "epsilon": row.epsilon if math.isfinite(row.epsilon) else None,
                    "noise_multiplier": row.noise_multiplier,
                    "share_clip_norms": row.share,
                    "signal_to_noise_over_local": row.gain,
                    "asked": row.asked,
                }
                for row in self.rows
            ],
        }


def plan_privacy(config: PlanConfig) -> Plan:
    """Calibrate, or account for a given noise. Nothing is trained and no data is read.

    Raises:
        PrivacyError: delta is not below one over the units, no survivor need be honest, or no noise suffices.
    """
    units = config.clients if config.mode == "client" else config.records
    if units is not None and config.delta * units >= 1:
        what = {"local": "the largest client's records", "distributed": "all records", "client": "the clients"}
        raise PrivacyError(
            f"delta {config.delta:g} is not below 1/{units}, one over {what[config.mode]}: such a promise allows "
            "publishing one outright",
            hint=f"--delta {0.1 / units:.1g}",
        )
    if config.mode != "local" and config.tolerated > (most := withstood(config.cohort or 0)):
        raise PrivacyError(
            f"{config.tolerated} of {config.cohort} clients may collude with the server, but against a malicious one "
            f"secure aggregation withstands {most}",
            hint=f"--corrupt {most} or less",
        )
    if config.mode != "local" and config.honest_survivors < 1:
        raise PrivacyError(
            f"{config.tolerated} colluding clients of at least {config.agreed_survivors} survivors leave nobody whose "
            "noise counts",
            hint="a larger --survivors, or a smaller --corrupt",
        )
    if config.epsilon is not None:
        epsilon, multiplier = config.epsilon, _calibrated(config, config.epsilon)
    else:
        multiplier = config.noise_multiplier or 0.0
        epsilon = math.inf
    statement = _statement(config, multiplier)
    if config.epsilon is None and statement.epsilon is not None:
        epsilon = statement.epsilon
    rows = [_row(config, epsilon, multiplier, asked=True)]
    for other in TABLE_EPSILONS:
        if other == epsilon:
            continue
        try:
            rows.append(_row(config, other, _calibrated(config, other), asked=False))
        except PrivacyError:  # this line only: no noise in reach, or none that the ring can hold
            rows.append(PlanRow(other, None, None, None, asked=False))
    return Plan(config, statement, tuple(sorted(rows, key=lambda row: row.epsilon)))


@dataclass(frozen=True, slots=True)
class Curves:
    """Epsilon against the noise multiplier at the asked rounds, and against rounds at the asked noise."""

    by_noise: tuple[tuple[float, float], ...]
    by_rounds: tuple[tuple[int, float], ...]


def curves(answer: Plan) -> Curves:
    """Points for the plot; upper bounds like everything else. Noise from half to twice, rounds up to twice."""
    config = answer.config
    multiplier = next(row.noise_multiplier for row in answer.rows if row.asked)
    if not multiplier or not answer.statement.private:
        raise PrivacyError("there is nothing to plot: no noise, or too little of it, promises nothing")
    spread = [multiplier * 2 ** (index / (CURVE_POINTS // 2) - 1) for index in range(CURVE_POINTS)]
    rounds = sorted({max(1, round(2 * config.rounds * index / CURVE_POINTS)) for index in range(1, CURVE_POINTS + 1)})

    def cost(noise: float, steps: int) -> float:
        history = (GaussianSteps(noise, config.rate, steps),)
        return epsilon_spent(history, delta=config.delta, excess=_CURVE_EXCESS)

    by_noise = ((noise, cost(noise, config.steps)) for noise in spread)
    by_rounds = ((count, cost(multiplier, count * config.local_steps)) for count in rounds)
    return Curves(
        tuple(point for point in by_noise if math.isfinite(point[1])),
        tuple(point for point in by_rounds if math.isfinite(point[1])),
    )


def _calibrated(config: PlanConfig, epsilon: float) -> float:
    return calibrate_noise(epsilon=epsilon, delta=config.delta, sampling_rate=config.rate, steps=config.steps)


def _row(config: PlanConfig, epsilon: float, multiplier: float, *, asked: bool) -> PlanRow:
    if config.mode == "local":
        return PlanRow(epsilon, multiplier, multiplier, 1.0, asked)
    ring = _ring(config, multiplier)
    share = ring.share_sigma / ring.encoding.scale
    # M survivors' clipped vectors add up to M times the signal, their noise to sqrt(M) times a share, so that for the
    # same M the ratio is that of the noise one client adds.
    return PlanRow(epsilon, multiplier, share, multiplier / share if share else None, asked)


def _ring(config: PlanConfig, multiplier: float) -> RingMechanism:
    return RingMechanism.plan(
        noise_multiplier=multiplier,
        honest_shares=config.honest_survivors,
        cohort=config.cohort or 0,
        dimension=config.parameters,
        coordinate_bound=1.0 if config.mode == "client" else COORDINATE_BOUND,
        ring_bits=config.ring_bits,
    )


def _statement(config: PlanConfig, multiplier: float) -> PrivacyStatement:
    """What a run would state if every client took part in every one of these rounds, at worst."""
    if config.mode == "local":
        history = GaussianSteps(multiplier, config.rate, config.steps)
        return local_statement({"client": [history]}, delta=config.delta, clip_norm=1.0, noise_is_private=True)
    return ring_statement(
        {"client": range(config.rounds)},
        survivors={},
        mechanism=_ring(config, multiplier),
        by_client=config.mode == "client",
        sampling_rate=config.rate,
        delta=config.delta,
        clip_norm=_CLIP_NORM_IN_WORDS,
        corrupt_clients=config.tolerated,
        noise_is_private=True,
    )
