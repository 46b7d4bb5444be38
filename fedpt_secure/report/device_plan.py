"""`fedpt-secure plan`: which configuration of the built-in proxy fits a device, from measured costs.

The costs are in `device_costs.json` beside this module, measured by `benchmarks/overhead.py --cost-model` on the
processor it names. Bytes are computed by the protocol's own encoders, noise by the accountant. The privacy side of a
plan is `report.plan` (`account`); this one is about the device.

**What memory means.** A device's limit is compared with the memory the training process cannot do without: its largest
resident size less the mapped files (libraries' code), which the system may drop and read again when memory is short.
Both figures are printed. Python and the libraries are three quarters of it.

Nothing of this looks at data: a client's tier is declared, never chosen from what it holds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpt_secure.config import (
    SMALLEST_COHORT,
    SMALLEST_DELTA,
    Count,
    FederationConfig,
    PrivacyConfig,
    Settings,
)
from fedpt_secure.crypto import client_bytes, secure_aggregation_parameters
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.privacy import calibrate_noise
from fedpt_secure.report.quantities import format_bytes

SCHEMA = "fedpt-secure/device-plan/1"
_COSTS = "device_costs.json"
_ANNOUNCEMENT_BYTES = 128
"""Of an announcement beside the adapter and the cohort's names: digests, counters, framing; rounded up."""
_CLIENT_NAME_BYTES = 26
"""Of a client's id in the announcement; a chat participant's is a UUID cut to 24."""
_DROPOUT_FRACTION = 0.1
_FEW_PARAMETERS = 20_000
"""Trained parameters up to which noise of an epsilon of a few units leaves a gain (docs/LOG.md)."""


class _Configuration(Settings):
    rank: Count
    layers: Count
    sampled_positions: Count | None
    training_dtype: Literal["auto", "float32"]
    trained_parameters: Count
    private_bytes: Count
    resident_bytes: Count
    seconds_per_record: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    flops_per_record: Count


class _Conditions(BaseModel):
    """Where it was measured; more may stand there than is read."""

    model_config = ConfigDict(frozen=True, extra="allow")
    processor: str
    context: Count


class DeviceCosts(Settings):
    """The measured costs: what was measured, where, and by which command."""

    schema_: Literal["fedpt-secure/device-costs/1"] = Field(alias="schema")
    command: str
    conditions: _Conditions
    configurations: Annotated[tuple[_Configuration, ...], Field(min_length=1, strict=False)]

    @classmethod
    def load(cls) -> DeviceCosts:
        """The costs that ship with this version.

        Raises:
            ModelError: the file is missing or damaged.
        """
        try:
            content = resources.files("fedpt_secure.report").joinpath(_COSTS).read_text(encoding="utf-8")
            return cls.model_validate(json.loads(content))
        except (OSError, ValueError, ValidationError) as error:
            raise ModelError(f"the measured costs are damaged: {error}", hint="reinstall fedpt-secure") from None


class DevicePlanConfig(Settings):
    """What `plan` is asked."""

    memory_bytes: Annotated[int, Field(ge=1)]
    bytes_per_day: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    epsilon: Annotated[float, Field(gt=0)] = PrivacyConfig.model_fields["epsilon"].default
    """inf for no privacy."""
    delta: Annotated[float, Field(ge=SMALLEST_DELTA, lt=1, allow_inf_nan=False)] = 1e-5
    participations: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Rounds that the device takes part in; a default run asks everybody about once."""
    cohort: Annotated[int, Field(ge=3, le=100_000)] = 26
    """Clients of a round; more of them send more shares of keys."""
    records: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Of the device, for the time of a round. Not its memory: records are read one at a time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One configuration, what it costs, and why it does not fit (nothing where it does)."""

    rank: int
    layers: int
    sampled_positions: int | None
    training_dtype: str
    trained_parameters: int
    private_bytes: int
    resident_bytes: int
    bytes_up: int
    bytes_down: int
    seconds_per_round: float
    objections: tuple[str, ...]

    @property
    def bytes_per_round(self) -> int:
        """Up and down."""
        return self.bytes_up + self.bytes_down


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The configuration that fits, and how it was found.

    Attributes:
        chosen: the most capable one that fits.
        reasons: sentences, in the order of the decision.
        passed_over: those before it, each with its objections.
        noise_multiplier: standard deviation over clip norm of a step, in mode `local`; 0 without privacy.
        rounds_per_day: that the bandwidth carries.
        command: the start of a run with it.
        settings: for `train --config`, where an option does not exist.
        measured: the processor and the command of the costs.
    """

    asked: DevicePlanConfig
    chosen: Choice
    reasons: tuple[str, ...]
    passed_over: tuple[Choice, ...]
    noise_multiplier: float
    rounds_per_day: float
    command: str
    settings: dict[str, Any]
    measured: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The answer for programs."""
        question = self.asked.model_dump()
        question["epsilon"] = self.asked.epsilon if math.isfinite(self.asked.epsilon) else None
        return {
            "schema": SCHEMA,
            "question": question,
            "chosen": _as_json(self.chosen),
            "noise_multiplier": self.noise_multiplier,
            "rounds_per_day": self.rounds_per_day,
            "reasons": list(self.reasons),
            "passed_over": [_as_json(choice) for choice in self.passed_over],
            "command": self.command,
            "settings": self.settings,
            "measured": self.measured,
        }


def plan_device(asked: DevicePlanConfig, costs: DeviceCosts) -> DevicePlan:
    """The most capable configuration that fits the device.

    Raises:
        ConfigError: nothing fits; the hint says what would.
        PrivacyError: no noise gives the epsilon.
    """
    choices = [_choice(configuration, asked) for configuration in costs.configurations]
    chosen = next((choice for choice in choices if not choice.objections), None)
    if chosen is None:
        raise _nothing_fits(asked, choices)
    noise = 0.0
    if math.isfinite(asked.epsilon):
        noise = calibrate_noise(epsilon=asked.epsilon, delta=asked.delta, sampling_rate=1.0, steps=asked.participations)
    rounds_per_day = asked.bytes_per_day / chosen.bytes_per_round
    settings: dict[str, dict[str, Any]] = {"lora": {"rank": chosen.rank, "layers": chosen.layers}}
    if chosen.sampled_positions is not None:
        settings["training"] = {"sampled_positions": chosen.sampled_positions}
    if chosen.training_dtype != "auto":
        settings["models"] = {"training_dtype": chosen.training_dtype}
    passed_over = tuple(choices[: choices.index(chosen)])
    options = f"--epsilon {asked.epsilon:g} --lora-rank {chosen.rank} --lora-layers {chosen.layers}"
    return DevicePlan(
        asked=asked,
        chosen=chosen,
        reasons=_reasons(asked, chosen, passed_over, noise, rounds_per_day, costs),
        passed_over=passed_over,
        noise_multiplier=noise,
        rounds_per_day=rounds_per_day,
        command=f"fedpt-secure train {options}",
        settings=settings,
        measured={"command": costs.command, **costs.conditions.model_dump()},
    )


def _choice(configuration: _Configuration, asked: DevicePlanConfig) -> Choice:
    parameters = secure_aggregation_parameters(
        asked.cohort, PrivacyConfig.model_fields["corrupt_fraction"].default, _DROPOUT_FRACTION
    )
    ring_bits = FederationConfig.model_fields["ring_bits"].default
    size = client_bytes(parameters, elements=configuration.trained_parameters, ring_bits=ring_bits)
    announcement = _ANNOUNCEMENT_BYTES + _CLIENT_NAME_BYTES * asked.cohort + 4 * configuration.trained_parameters
    up, down = size.total_up, size.total_down + announcement
    objections = []
    if configuration.private_bytes > asked.memory_bytes:
        objections.append(
            f"needs {format_bytes(configuration.private_bytes)} of memory, of {format_bytes(asked.memory_bytes)}"
        )
    if up + down > asked.bytes_per_day:
        objections.append(
            f"moves {format_bytes(up + down)} a round, of {format_bytes(asked.bytes_per_day)} a day: not one round"
        )
    if math.isfinite(asked.epsilon) and configuration.trained_parameters > _FEW_PARAMETERS:
        objections.append(
            f"trains {configuration.trained_parameters:,} parameters, and noise of a finite epsilon on more than "
            f"{_FEW_PARAMETERS:,} took more than they gave (docs/LOG.md)"
        )
    return Choice(
        rank=configuration.rank,
        layers=configuration.layers,
        sampled_positions=configuration.sampled_positions,
        training_dtype=configuration.training_dtype,
        trained_parameters=configuration.trained_parameters,
        private_bytes=configuration.private_bytes,
        resident_bytes=configuration.resident_bytes,
        bytes_up=up,
        bytes_down=down,
        seconds_per_round=configuration.seconds_per_record * asked.records,
        objections=tuple(objections),
    )


def _reasons(
    asked: DevicePlanConfig,
    chosen: Choice,
    passed_over: tuple[Choice, ...],
    noise: float,
    rounds_per_day: float,
    costs: DeviceCosts,
) -> tuple[str, ...]:
    reasons = [f"{describe(choice)}: passed over, it {'; it '.join(choice.objections)}" for choice in passed_over]
    reasons.append(
        f"{describe(chosen)}: the most capable one that fits; configurations are tried from the most trained "
        "parameters to the fewest"
    )
    reasons.append(
        f"memory: {format_bytes(chosen.private_bytes)} that the process cannot do without "
        f"({format_bytes(chosen.resident_bytes)} resident with the libraries' code), of "
        f"{format_bytes(asked.memory_bytes)}"
    )
    reasons.append(
        f"bandwidth: {format_bytes(chosen.bytes_up)} up and {format_bytes(chosen.bytes_down)} down a round with "
        f"{asked.cohort} clients, secure aggregation included: {rounds_per_day:.3g} rounds a day; the proxy comes with "
        "the package"
    )
    reasons.append(
        f"time: {chosen.seconds_per_round:.1f} s a round for {asked.records} records of "
        f"{costs.conditions.context} tokens, processor time of one thread of {costs.conditions.processor}"
    )
    if math.isfinite(asked.epsilon):
        reasons.append(
            f"privacy: epsilon {asked.epsilon:g} at delta {asked.delta:g} over {asked.participations} rounds takes "
            f"noise of {noise:.4g} clip norms a step, added by the device itself (mode local)"
        )
    else:
        reasons.append("privacy: none; epsilon is infinite")
    return tuple(reasons)


def describe(choice: Choice) -> str:
    """A configuration in words."""
    layers = "the last layer" if choice.layers == 1 else f"the last {choice.layers} layers"
    positions = "" if choice.sampled_positions is None else f", {choice.sampled_positions} sampled positions a record"
    dtype = "" if choice.training_dtype == "auto" else f", trained in {choice.training_dtype} without a faster copy"
    return f"rank {choice.rank} on {layers} ({choice.trained_parameters:,} parameters{positions}{dtype})"


def _nothing_fits(asked: DevicePlanConfig, choices: list[Choice]) -> ConfigError:
    allowed = [
        choice for choice in choices if not math.isfinite(asked.epsilon) or choice.trained_parameters <= _FEW_PARAMETERS
    ]
    carried = [choice for choice in allowed if choice.bytes_per_round <= asked.bytes_per_day]
    held = [choice for choice in allowed if choice.private_bytes <= asked.memory_bytes]
    ways = []
    if carried:
        ways.append(f"--memory {format_bytes(min(choice.private_bytes for choice in carried))}")
    if held:
        ways.append(f"--bandwidth {format_bytes(min(choice.bytes_per_round for choice in held))}/day")
    if not ways:  # both limits are short of every configuration: one of them, whole
        least = min(allowed, key=lambda choice: (choice.bytes_per_round, choice.private_bytes))
        ways.append(
            f"--memory {format_bytes(least.private_bytes)} with --bandwidth {format_bytes(least.bytes_per_round)}/day"
        )
    also = f"; a smaller cohort moves fewer key shares (now {asked.cohort})" if asked.cohort > SMALLEST_COHORT else ""
    return ConfigError(
        f"no configuration fits {format_bytes(asked.memory_bytes)} of memory and "
        f"{format_bytes(asked.bytes_per_day)} a day: the last tried, {describe(choices[-1])}, "
        f"{'; it '.join(choices[-1].objections)}",
        hint=f"this would do: {', or '.join(ways)}{also}",
    )


def _as_json(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in Choice.__dataclass_fields__ if name != "objections"} | {
        "objections": list(choice.objections)
    }
