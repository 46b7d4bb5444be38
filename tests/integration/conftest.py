"""Settings of a run small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpt_secure.config import RunConfig, build


@pytest.fixture
def tiny_settings(tiny_models: dict[str, str], chat_file: Path) -> dict[str, Any]:
    """Nested settings, as in `config.toml`."""
    return {
        "seed": 3,
        "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "large": tiny_models["large"], "device": "cpu", "context_length": 12},
        "lora": {"rank": 2},
        "federation": {"rounds": 3, "cohort": 5},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
    }


@pytest.fixture
def tiny_config(tiny_settings: dict[str, Any]) -> RunConfig:
    return build(RunConfig, tiny_settings)
