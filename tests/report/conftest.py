"""A finished run in miniature, made once; tests copy it before they damage it."""

from __future__ import annotations

import json
import shutil

import pytest

from fedpt_secure import files
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise


@pytest.fixture(scope="session")
def tiny_run_settings(tiny_models, chat_file):
    return {
        "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "large": tiny_models["large"], "device": "cpu", "context_length": 12},
        "lora": {"rank": 2},
        "federation": {"rounds": 2, "cohort": 5},
        "evaluation": {"records": 10},
    }


@pytest.fixture(scope="session")
def finished_runs(tiny_run_settings, tmp_path_factory):
    """Name -> directory of a private run and of one without privacy."""
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, epsilon in (("private", 4.0), ("bare", float("inf"))):
        config = build(RunConfig, {**tiny_run_settings, "privacy": {"epsilon": epsilon}})
        directory = RunDirectory.create(place / name, config)
        result = run_training(config, directory, cache=Cache(place / "cache"), progress=SILENT)
        files.write_json(directory.path / "summary.json", summarise(result))
        made[name] = directory.path
    return made


@pytest.fixture
def runs(finished_runs, tmp_path):
    """Copies of `finished_runs` that a test may change."""
    copies = {}
    for name, path in finished_runs.items():
        copies[name] = tmp_path / name
        shutil.copytree(path, copies[name])
    return copies


@pytest.fixture
def change_json():
    def change(path, **changes):
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps(content))

    return change
