"""`report`, `compare` and `sweep`: what they print where, what they leave, and one line for every bad input."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app

RUNNER = CliRunner()


def invoke(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def sweep_arguments(tiny_models, chat_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "shared.toml"
    config.write_text(
        f"""
        [data]
        source = '{chat_file}'
        client_column = "who"
        text_column = "said"
        [models]
        small = '{tiny_models["small"]}'
        large = '{tiny_models["large"]}'
        device = "cpu"
        context_length = 12
        [lora]
        rank = 2
        [federation]
        cohort = 5
        """
    )
    return ["sweep", "--config", config, "--rounds", 2, "--evaluation-records", 10, "--out", tmp_path / "sweep"]


def test_a_sweep_then_its_report_and_a_comparison(sweep_arguments, tmp_path):
    made = invoke(*sweep_arguments, "--epsilon", "4,inf", "--json")
    assert made.exit_code == 0, made.output
    outcome = json.loads(made.stdout)
    assert outcome["finished"] == ["e4-local-s0", "einf-local-s0"]
    assert "cost the sum" in made.stderr

    report = invoke("report", tmp_path / "sweep", "--json")
    assert report.exit_code == 0, report.output
    assert json.loads(report.stdout)["subject"] == "e4-local-s0"
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in (tmp_path / "sweep").iterdir()}

    cells = tmp_path / "sweep" / "cells"
    compared = invoke("compare", cells / "e4-local-s0", cells / "einf-local-s0")
    assert compared.exit_code == 0, compared.output
    for expected in ("privacy.epsilon", "nothing is promised", "NOT PRIVATE", "nats per token more"):
        assert expected in compared.stdout


def test_a_report_prints_claim_utility_and_verdict(sweep_arguments, tmp_path):
    assert invoke(*sweep_arguments, "--epsilon", "4").exit_code == 0
    report = invoke("report", tmp_path / "sweep", "--out", tmp_path / "report")
    assert report.exit_code == 0, report.output
    for expected in ("Privacy. epsilon <=", "Utility.", "Audit: not audited."):
        assert expected in report.stdout
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["sweep", "--epsilon", "four", "--out", "x"], 2, "--epsilon is 'four'"),
        (["sweep", "--epsilon", "4,4", "--out", "x"], 2, "twice"),
        (["sweep", "--mode", "central", "--out", "x"], 2, "modes"),
        (["report", "nowhere"], 8, "nowhere"),
        (["compare", "nowhere", "elsewhere"], 8, "nowhere"),
    ],
)
def test_bad_input_is_one_line_with_its_own_exit_code(arguments, code, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert expected in result.stderr
    assert "error:" in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
