"""Finished runs small enough for a test, and audits of them."""

from __future__ import annotations

import shutil

import pytest

from fedpt_secure.attacks import AuditSettings, mechanism_part, run_audit, server_view_part
from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.progress import SILENT


@pytest.fixture(scope="session")
def audited_settings(tiny_models, chat_file):
    """A run that is planted with canaries and secrets, and whose server view is kept."""
    return {
        "seed": 3,
        "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "large": tiny_models["large"], "device": "cpu", "context_length": 24},
        "lora": {"rank": 8, "layers": 0},
        # Gradients of a random model this small are about 0.02 long: so that they are clipped.
        "privacy": {"clip_norm": 0.001},
        "federation": {"rounds": 2, "cohort": 6},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
        "audit": {"canaries": 120, "secrets": 1, "record_server_view": True},
    }


@pytest.fixture(scope="session")
def train_at(audited_settings, tmp_path_factory):
    """`train_at(path, **groups)`: a finished run with some groups of settings changed."""

    def train(path, **groups):
        config = build(RunConfig, overlay(audited_settings, groups))
        directory = RunDirectory.create(path, config)
        run_training(config, directory, cache=Cache(tmp_path_factory.getbasetemp() / "cache"), progress=SILENT)
        return directory

    return train


@pytest.fixture(scope="session")
def _finished(train_at, tmp_path_factory):
    made = {}

    def finished(**groups):
        key = repr(sorted(groups.items()))
        if key not in made:
            made[key] = train_at(tmp_path_factory.mktemp("runs") / "run", **groups).path
        return made[key]

    return finished


@pytest.fixture
def finished(_finished, tmp_path):
    """`finished(**groups)`: a copy of a finished run, trained once a session."""

    def copy(**groups):
        path = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(_finished(**groups), path)
        return RunDirectory.open(path)

    return copy


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """`audit(directory, **settings)`: the result, with sizes that a test can wait for."""
    monkeypatch.setattr(mechanism_part, "MOST_TRIALS", mechanism_part.FEWEST_TRIALS)
    monkeypatch.setattr(mechanism_part, "MOST_ROUNDS", 4)
    monkeypatch.setattr(server_view_part, "MOST_CANDIDATES", server_view_part.FEWEST_CANDIDATES)

    def run(directory, **settings):
        return run_audit(
            directory, build(AuditSettings, settings, command="audit"), cache=Cache(tmp_path / "cache"), progress=SILENT
        )

    return run
