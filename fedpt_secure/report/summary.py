"""`summary.json`: the result of a run as one versioned object (fields: docs/run_directory.md)."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure import __version__
from fedpt_secure.evaluation import (
    ArmsEvaluation,
    bootstrap_rng,
    fraction_improved,
    improvement_interval,
    perplexity,
    ratio_interval,
)
from fedpt_secure.federation import RunResult, privacy_document
from fedpt_secure.proxy import SteeringRule

SCHEMA = "fedpt-secure/summary/1"
_PACKAGES = ("torch", "transformers", "peft", "opacus", "PyNaCl", "cryptography", "dp-accounting", "datasets", "numpy")


def summarise(result: RunResult) -> dict[str, Any]:
    """Everything a reader compares, as JSON values; a number too large for JSON is null."""
    config, evaluation = result.config, result.evaluation
    rule = SteeringRule.of(config.proxy, responses=config.data.has_prompts)
    transcripts = result.transcripts
    return {
        "schema": SCHEMA,
        "private": result.statement.private,
        **utility(
            evaluation,
            rule=rule,
            seed=config.seed,
            resamples=config.evaluation.bootstrap_samples,
        ),
        "alpha": config.proxy.alpha,
        "shares": [list(entry) for entry in rule.shares],
        "privacy": privacy_document(result.statement, result.aggregation),
        "data": {
            "name": result.text.name,
            "description": result.text.description,
            "digest": result.text.digest,
            "clients": len(result.text.clients),
            "train_records": sum(len(client.train) for client in result.text.clients),
            "held_out_records": sum(len(client.held_out) for client in result.text.clients),
        },
        "training": {
            "large": result.large_source,
            "small": config.models.small,
            "trained_parameters": result.dimension,
            "lora_directions": result.directions,
            "rounds": config.federation.rounds,
            "rounds_aborted": sum(bool(line["aborted"]) for line in transcripts),
            "cohort": config.federation.agreed_cohort,
            "dropped": sum(len(line["dropped"]) for line in transcripts),
        },
        "black_box": dict(result.black_box),
        "bytes": byte_counts(transcripts),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()}
        | {f"rounds.{name}": round(value, 3) for name, value in phase_seconds(transcripts).items()},
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


def utility(evaluation: ArmsEvaluation, *, rule: SteeringRule, seed: int, resamples: int) -> dict[str, Any]:
    """Losses of the arms, and what proxy tuning gained, with percentile-bootstrap intervals over records."""
    rng = bootstrap_rng(seed)
    proxied = evaluation.proxy_tuned[rule]
    losses = {
        "large_base": evaluation.large_base,
        "small_base": evaluation.small_base,
        "small_tuned": evaluation.small_tuned,
        "proxy_tuned": proxied,
    }
    arms = {name: arm(sums, evaluation.tokens, rng, resamples=resamples) for name, sums in losses.items()}
    gain = improvement_interval(evaluation.large_base, proxied, evaluation.tokens, rng, resamples=resamples)
    return {
        "arms": arms,
        "improvement": {
            "loss": gain.value,
            "ci": [gain.low, gain.high],
            "fraction_improved": fraction_improved(evaluation.large_base, proxied),
            "versus": "large_base",
        },
        "evaluation": {
            "records": len(evaluation.tokens),
            "tokens": int(evaluation.tokens.sum()),
            "confidence": 0.95,
        },
    }


def arm(sums: npt.ArrayLike, tokens: npt.ArrayLike, rng: np.random.Generator, *, resamples: int) -> dict[str, Any]:
    """Loss of one arm in nats per token with its interval, and its perplexity (null where it overflows)."""
    loss = ratio_interval(sums, tokens, rng, resamples=resamples)
    value = perplexity(loss).value
    return {
        "loss": loss.value,
        "perplexity": value if math.isfinite(value) else None,
        "ci": [loss.low, loss.high],
    }
