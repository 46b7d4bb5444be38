"""`summary.json`: the result of a run as one versioned object (fields: docs/run_directory.md)."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fedpt_secure import __version__
from fedpt_secure.evaluation import ArmReport, report_arms
from fedpt_secure.federation import RunResult

SCHEMA = "fedpt-secure/summary/1"
_PACKAGES = ("torch", "transformers", "peft", "opacus", "PyNaCl", "cryptography", "dp-accounting", "datasets", "numpy")


def summarise(result: RunResult) -> dict[str, Any]:
    """Everything a reader compares, as JSON values; infinite numbers are null."""
    config = result.config
    report = report_arms(
        result.evaluation,
        alpha=config.proxy.alpha,
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed,
    )
    return {
        "schema": SCHEMA,
        "private": result.statement.private,
        "arms": {name: _arm(arm) for name, arm in report.arms.items()},
        "improvement": {
            "loss": report.improvement,
            "ci": list(report.improvement_ci),
            "fraction_improved": report.fraction_improved,
            "versus": "large_base",
        },
        "alpha": config.proxy.alpha,
        "evaluation": {"records": report.records, "tokens": report.tokens, "confidence": report.confidence},
        "privacy": result.statement.to_json(),
        "data": {
            "name": result.text.name,
            "description": result.text.description,
            "digest": result.text.digest,
            "clients": len(result.text.clients),
            "train_records": sum(len(client.train) for client in result.text.clients),
            "held_out_records": sum(len(client.held_out) for client in result.text.clients),
        },
        "training": {
            "large": result.large_name,
            "small": config.models.small,
            "trained_parameters": result.dimension,
            "rounds": config.federation.rounds,
            "rounds_aborted": sum(bool(line["aborted"]) for line in result.transcripts),
            "cohort": config.federation.cohort,
            "dropped": sum(len(line["dropped"]) for line in result.transcripts),
        },
        "bytes": byte_counts(result.transcripts),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()}
        | {f"rounds.{name}": round(value, 3) for name, value in phase_seconds(result.transcripts).items()},
        "versions": {"fedpt-secure": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }


def byte_counts(transcripts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes per client and round, over the clients that were asked: mean up, mean down; and the run's totals."""
    up = [count for line in transcripts for count in line["bytes_up"].values()]
    down = [count for line in transcripts for count in line["bytes_down"].values()]
    return {
        "up_per_client_round": round(sum(up) / len(up), 1) if up else 0.0,
        "down_per_client_round": round(sum(down) / len(down), 1) if down else 0.0,
        "up_total": sum(up),
        "down_total": sum(down),
    }


def phase_seconds(transcripts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by protocol phase, summed over rounds; simulated clients run one after the other."""
    totals: dict[str, float] = {}
    for line in transcripts:
        for phase, seconds in line["seconds"].items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return totals


def _arm(arm: ArmReport) -> dict[str, Any]:
    return {
        "loss": arm.loss,
        "perplexity": arm.perplexity if math.isfinite(arm.perplexity) else None,
        "ci": list(arm.ci),
    }

