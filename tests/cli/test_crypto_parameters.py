"""`fedpt-secure crypto parameters`: a table for people, the same numbers as JSON, one line for what cannot be."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.crypto import secure_aggregation_parameters

RUNNER = CliRunner()


def invoke(*arguments):
    return RUNNER.invoke(app, ["crypto", "parameters", *(str(argument) for argument in arguments)])


def test_json_holds_what_the_library_says():
    result = invoke("--cohort", 64, "--cohort", 256, "--corrupt", 0.1, "--dropout", 0.1, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    for row, size in zip(rows, (64, 256), strict=True):
        expected = secure_aggregation_parameters(size, 0.1, 0.1)
        for name in ("degree", "threshold", "minimum_survivors", "tolerated_corruptions", "adversary"):
            assert row[name] == getattr(expected, name)
    assert rows[0]["failure"] == {"split_log2": None, "neighbourhood_log2": None, "lost_round_log2": None}
    assert rows[1]["failure"]["lost_round_log2"] < -20
    assert rows[1]["bytes"]["up"] == sum(rows[1]["bytes"]["up_by_phase"].values())


def test_the_bits_and_the_vector_are_the_ones_asked_for():
    weak = json.loads(
        invoke("--cohort", 256, "--security-bits", 20, "--grinding-bits", 0, "--elements", 10, "--json").stdout
    )[0]
    strong = json.loads(invoke("--cohort", 256, "--security-bits", 60, "--elements", 10, "--json").stdout)[0]
    assert weak["degree"] < strong["degree"]
    assert weak["asked"] == {"security_bits": 20, "correctness_bits": 20, "grinding_bits": 0}
    assert weak["bytes"]["up"] < 20_000


def test_the_table_says_against_whom_and_fits_a_terminal():
    result = invoke("--cohort", 64, "--cohort", 1000, "--cohort", 10_000)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "actively malicious server with 100 of 1000 clients, that tries out up to 2^64 graphs" in text
    assert "picks whom to call lost when it knows the graph" in text
    assert "\u2026" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cohort", 1),
        ("--cohort", 20, "--corrupt", 0.5, "--dropout", 0.4),
        ("--cohort", 20, "--corrupt", -0.1),
        ("--cohort", 20, "--dropout", "nan"),
        ("--cohort", 20, "--elements", 0),
        ("--cohort", 20, "--ring-bits", 8),
        ("--cohort", 20, "--security-bits", -1),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error:") == 1
