"""Two finished runs side by side: what they promise, what they gained, what they cost, and what was set differently."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedpt_secure.errors import ConfigError
from fedpt_secure.report.audit_sections import audit_verdict
from fedpt_secure.report.run_record import ARMS, RunRecord, epsilon_name
from fedpt_secure.report.run_sections import flat_settings
from fedpt_secure.report.utility_sections import ARM_NAMES

SCHEMA = "fedpt-secure/comparison/1"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a reader compares.

    Attributes:
        rows: (what, in the first run, in the second).
        settings: (setting, in the first, in the second), only those that differ.
        gain_difference: second minus first, nats per token, and its interval; None where the runs were not judged on
            the same records.
        same_records: whether they were.
        claims: both privacy claims in full.
    """

    names: tuple[str, str]
    rows: tuple[tuple[str, str, str], ...]
    settings: tuple[tuple[str, str, str], ...]
    gain_difference: tuple[float, float, float] | None
    same_records: bool
    claims: tuple[str, str]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        difference = self.gain_difference
        return {
            "schema": SCHEMA,
            "runs": list(self.names),
            "claims": list(self.claims),
            "rows": [list(row) for row in self.rows],
            "settings": [list(row) for row in self.settings],
            "same_records": self.same_records,
            "gain_difference": None if difference is None else {"value": difference[0], "ci": list(difference[1:])},
        }


def compare_runs(first: RunRecord, second: RunRecord) -> Comparison:
    """Compare two finished runs.

    The difference of their gains has an interval only where both were judged on the same records. It treats the two
    intervals as independent, which for the same records is too wide rather than too narrow.

    Raises:
        ConfigError: it is the same run twice.
    """
    if first.path.resolve() == second.path.resolve():
        raise ConfigError(f"{first.path} is named twice; a run is not compared with itself")
    same = all(
        first.summary[group] == second.summary[group] and first.config.seed == second.config.seed
        for group in ("evaluation", "data")
    )
    told: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("privacy mode", lambda run: run.config.privacy.mode),
        ("epsilon asked for", lambda run: epsilon_name(run.epsilon)),
        ("epsilon stated", _stated),
        ("delta", lambda run: f"{run.privacy['delta']:g}"),
        ("unit", lambda run: str(run.privacy["unit"])),
        *((ARM_NAMES[arm], partial(_loss, arm=arm)) for arm in ARMS),
        ("gain over the large LM alone", _gain),
        ("records improved", lambda run: f"{run.summary['improvement']['fraction_improved']:.1%}"),
        ("held-out records", lambda run: str(run.summary["evaluation"]["records"])),
        ("trained parameters", lambda run: f"{run.summary['training']['trained_parameters']:,}"),
        ("rounds (aborted)", _rounds),
        ("MB up, all clients", lambda run: f"{run.summary['bytes']['up_total'] / 1e6:.2f}"),
        ("MB down, all clients", lambda run: f"{run.summary['bytes']['down_total'] / 1e6:.2f}"),
        ("seconds of rounds", lambda run: f"{run.summary['seconds'].get('rounds', 0.0):.0f}"),
        ("audit", lambda run: audit_verdict(run)[0]),
    ]
    rows = [(name, tell(first), tell(second)) for name, tell in told]
    return Comparison(
        names=(first.name, second.name),
        rows=tuple(rows),
        settings=_settings(first, second),
        gain_difference=_difference(first, second) if same else None,
        same_records=same,
        claims=(str(first.privacy["claim"]), str(second.privacy["claim"])),
    )


def _difference(first: RunRecord, second: RunRecord) -> tuple[float, float, float]:
    gains = [run.summary["improvement"] for run in (first, second)]
    value = gains[1]["loss"] - gains[0]["loss"]
    half = math.hypot(*((gain["ci"][1] - gain["ci"][0]) / 2 for gain in gains))
    return value, value - half, value + half


def _stated(run: RunRecord) -> str:
    epsilon = run.privacy["epsilon"]
    return "nothing is promised" if epsilon is None else f"<= {epsilon:g}"


def _loss(run: RunRecord, arm: str) -> str:
    found = run.summary["arms"][arm]
    return f"{found['loss']:.4f} [{found['ci'][0]:.4f}, {found['ci'][1]:.4f}]"


def _gain(run: RunRecord) -> str:
    gain = run.summary["improvement"]
    return f"{gain['loss']:+.4f} [{gain['ci'][0]:.4f}, {gain['ci'][1]:.4f}]"


def _rounds(run: RunRecord) -> str:
    training = run.summary["training"]
    return f"{training['rounds']} ({training['rounds_aborted']})"


def _settings(first: RunRecord, second: RunRecord) -> tuple[tuple[str, str, str], ...]:
    left, right = (dict(flat_settings(run.config.model_dump())) for run in (first, second))
    keys = sorted(left.keys() | right.keys())
    return tuple(
        (key, left.get(key, ""), right.get(key, "")) for key in keys if left.get(key, "") != right.get(key, "")
    )
