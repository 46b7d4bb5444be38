"""`train --aggregator`: what it says about trust, and one line where it cannot be had."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app


@pytest.fixture
def train(tiny_models, chat_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fixed = [
        *("train", "--data", chat_file, "--client-column", "who", "--text-column", "said"),
        *("--small", tiny_models["small"], "--large", tiny_models["large"], "--device", "cpu"),
        *("--context-length", 12, "--rounds", 1, "--cohort", 5, "--lora-rank", 2, "--evaluation-records", 10),
        *("--out", tmp_path / "run"),
    ]
    return lambda *more: CliRunner().invoke(app, [str(argument) for argument in (*fixed, *more)])


def test_ckks_says_at_the_start_that_one_colluding_client_breaks_it(train, tmp_path):
    pytest.importorskip("tenseal")
    result = train("--aggregator", "ckks", "--json")
    assert result.exit_code == 0, result.output
    assert "one colluding client breaks the privacy of all" in result.stderr
    assert "honest but curious" in result.stderr
    assert json.loads(result.stdout)["privacy"]["aggregation"]["aggregator"] == "ckks"


def test_without_tenseal_it_is_one_line_with_a_hint_before_anything_is_made(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    result = train("--aggregator", "ckks")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error:") == 1
    assert 'hint: pip install "fedpt-secure[ckks]"' in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_modes_without_a_proof_under_ckks_are_refused(train, tmp_path, mode):
    result = train("--aggregator", "ckks", "--privacy", mode)
    assert result.exit_code == 6, result.output
    assert result.stderr.count("error:") == 1
    assert mode in result.stderr
    assert not (tmp_path / "run").exists()
