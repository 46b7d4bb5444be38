"""What several benchmarks' tests start from."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def tiny_run(tiny_models: dict[str, str]) -> list[str]:
    """`--set` words that make a run of the utility benchmarks small enough for a test."""
    settings = {
        "models.small": json.dumps(tiny_models["small"]),
        "models.large": json.dumps(tiny_models["large"]),
        "models.context_length": 12,
        "models.device": '"cpu"',
        "lora.rank": 2,
        "lora.layers": 1,
        "federation.rounds": 2,
        "federation.cohort": 6,
        "evaluation.records": 12,
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
