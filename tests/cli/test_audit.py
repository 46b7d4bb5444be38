"""`fedpt-secure audit`: exit codes and what is printed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedpt_secure.attacks import parse_duration
from fedpt_secure.cli import app
from fedpt_secure.errors import ConfigError

RESULT = {
    "schema": "fedpt-secure/audit/1",
    "verdict": {
        "violation": False,
        "violations": [],
        "sentence": "no violation detected; could have detected eps > 4.90",
        "epsilon_lower_bound": 0.3,
        "detectable_epsilon": 4.9,
        "false_alarm_bound": 0.05,
    },
    "claim": {"epsilon": 4.0, "delta": 1e-5, "unit": "record", "source": "privacy.json"},
    "checks": [{"name": "canaries", "violation": False, "decisive": True, "sentence": "epsilon >= 0.3 [95 %]"}],
    "budget": {"cost_in_power": ["canaries: 10 of 20"]},
}


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """The command over a given result, without a run."""

    def invoke(result, *options):
        asked = []

        def run_audit(directory, settings, *, cache, progress):
            asked.append(settings)
            return result

        monkeypatch.setattr("fedpt_secure.attacks.run_audit", run_audit)
        (tmp_path / "config.toml").write_text("")
        return CliRunner().invoke(app, ["audit", "--run", str(tmp_path), *options]), asked

    return invoke


def test_no_violation_is_exit_code_0_and_the_verdict_says_what_could_have_been_detected(answer):
    done, asked = answer(RESULT, "--budget", "10m", "--claimed-epsilon", "4", "--parts", "canaries, mechanism")
    assert done.exit_code == 0
    assert "no violation detected; could have detected eps > 4.90" in " ".join(done.stdout.split())
    assert "canaries: 10 of 20" in done.stdout
    assert (asked[0].budget_seconds, asked[0].claimed_epsilon) == (600, 4.0)
    assert asked[0].parts == ("canaries", "mechanism")


def test_a_violation_is_exit_code_3(answer):
    verdict = RESULT["verdict"] | {"violation": True, "sentence": "violation: too little noise"}
    done, _ = answer(RESULT | {"verdict": verdict}, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["verdict"]["violation"] is True


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "soon"),
        ("--budget", "0s"),
        ("--shadows", "1"),
        ("--parts", "everything"),
        ("--claimed-epsilon", "-1"),
        ("--alpha", "0.7"),
    ],
)
def test_settings_that_make_no_sense_are_exit_code_2(answer, options):
    done, asked = answer(RESULT, *options)
    assert done.exit_code == 2
    assert not asked


def test_a_directory_that_is_no_run_is_exit_code_8(tmp_path):
    done = CliRunner().invoke(app, ["audit", "--run", str(tmp_path)])
    assert done.exit_code == 8


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45)])
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-3s", "10 days", "1e9h", "nan"])
def test_other_durations_are_refused(text):
    with pytest.raises(ConfigError, match="time budget"):
        parse_duration(text)
