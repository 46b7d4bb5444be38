"""`fedpt-secure account`: the table, the one line that says what an epsilon means, and one line for every refusal."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app

RUNNER = CliRunner()


def invoke(*arguments):
    return RUNNER.invoke(app, ["account", *(str(argument) for argument in arguments)])


@pytest.fixture(autouse=True)
def _short_table(monkeypatch):
    monkeypatch.setattr("fedpt_secure.report.plan.TABLE_EPSILONS", (8.0,))


def test_the_promise_is_printed_with_all_that_it_depends_on(tmp_path):
    result = invoke("--epsilon", 4, "--delta", 1e-5, "--rounds", 20, "--rate", 0.05, "--plot", tmp_path / "e.svg")
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    for part in (
        "noise multiplier",
        "epsilon <=",
        "delta = 1e-05",
        "single record",
        "neighbouring",
        "Accountant: dp-acc",
    ):
        assert part in flat
    assert "against anyone who sees all the client ever sends" in flat
    assert "share" not in flat
    assert (tmp_path / "e.svg").exists()
    assert "plot:" in result.stderr


def test_in_the_modes_of_shares_the_share_and_its_gain_are_shown():
    result = invoke("--noise-multiplier", 1, "--rounds", 5, "--rate", 0.1, "--mode", "distributed", "--cohort", 20)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "share, clip norms" in flat
    assert "signal/noise over local" in flat
    assert "at most 2 clients" in flat


def test_json_holds_the_question_the_statement_and_the_rows():
    result = invoke("--epsilon", 4, "--rounds", 3, "--json")
    content = json.loads(result.stdout)
    assert content["question"] == {
        "mode": "local",
        "epsilon": 4.0,
        "delta": 1e-5,
        "rounds": 3,
        "rate": 1.0,
        "local_steps": 1,
        "parameters": 18432,
        "ring_bits": 32,
    }
    assert content["statement"]["epsilon"] <= 4.0
    assert [row["epsilon"] for row in content["rows"]] == [4.0, 8.0]


@pytest.mark.parametrize(
    ("arguments", "code", "rule"),
    [
        (("--epsilon", 4, "--noise-multiplier", 1), 2, "one of them"),
        ((), 2, "one of them"),
        (("--epsilon", "nan"), 2, "epsilon"),
        (("--epsilon", 0), 2, "epsilon"),
        (("--epsilon", 4, "--rate", 1.5), 2, "rate"),
        (("--epsilon", 4, "--delta", 1), 2, "delta"),
        (("--epsilon", 4, "--mode", "global"), 2, "mode"),
        (("--epsilon", 4, "--plot", "plot.pdf"), 2, "svg"),
        (("--epsilon", 4, "--records", 100_000), 6, "one over the largest client's records"),
        (
            ("--epsilon", 4, "--mode", "client", "--cohort", 9, "--survivors", 3, "--corrupt", 3),
            6,
            "nobody whose noise",
        ),
    ],
)
def test_a_refusal_is_one_line_with_a_hint_and_its_exit_code(arguments, code, rule):
    result = invoke("--rounds", 3, *arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    error, hint = result.stderr.strip().split("\n")
    assert error.startswith("error:")
    assert rule in error
    assert hint.startswith("hint:")
