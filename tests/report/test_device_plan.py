"""`fedpt-secure plan`: the most capable configuration that fits, why, and what would fit where none does."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.privacy import calibrate_noise
from fedpt_secure.report import device_plan
from fedpt_secure.report.device_plan import DeviceCosts, DevicePlanConfig, plan_device

RUNNER = CliRunner()


def configuration(parameters, private, **changes):
    found = {
        "rank": 8,
        "layers": 1,
        "sampled_positions": None,
        "training_dtype": "auto",
        "trained_parameters": parameters,
        "private_bytes": private,
        "resident_bytes": private + 100,
        "seconds_per_record": 0.5,
        "flops_per_record": 10,
    }
    return found | changes


def costs(*configurations):
    content = {
        "schema": "fedpt-secure/device-costs/1",
        "command": "by hand",
        "conditions": {"processor": "a test", "context": 128},
        "configurations": list(configurations),
    }
    return DeviceCosts.model_validate(content)


THREE = costs(
    configuration(50_000, 3_000, layers=3), configuration(10_000, 2_000, rank=4), configuration(1_000, 1_000, rank=2)
)


def asked(**changes):
    return DevicePlanConfig(**({"memory_bytes": 5_000, "bytes_per_day": 1e7} | changes))


def test_without_privacy_the_first_that_fits_is_taken():
    assert plan_device(asked(epsilon=math.inf), THREE).chosen.trained_parameters == 50_000
    small = plan_device(asked(epsilon=math.inf, memory_bytes=2_500), THREE)
    assert small.chosen.trained_parameters == 10_000
    assert "3kB" in small.passed_over[0].objections[0]


def test_the_settings_name_the_dtype_that_makes_it_fit():
    both = costs(configuration(1_000, 9_000), configuration(1_000, 4_000, training_dtype="float32"))
    assert "models" not in plan_device(asked(memory_bytes=9_000), both).settings
    found = plan_device(asked(memory_bytes=5_000), both)
    assert found.settings["models"] == {"training_dtype": "float32"}
    assert "float32" in found.reasons[1]


def test_a_finite_epsilon_passes_over_many_trained_parameters_and_says_so():
    plan = plan_device(asked(epsilon=4.0), THREE)
    assert plan.chosen.trained_parameters == 10_000
    assert "50,000 parameters" in plan.reasons[0]
    expected = calibrate_noise(epsilon=4.0, delta=1e-5, sampling_rate=1.0, steps=1)
    assert plan.noise_multiplier == expected


def test_bandwidth_must_carry_a_round_a_day():
    whole = plan_device(asked(epsilon=4.0), THREE).chosen.bytes_per_round
    plan = plan_device(asked(epsilon=4.0, bytes_per_day=whole - 1.0), THREE)
    assert plan.chosen.trained_parameters == 1_000
    assert plan.rounds_per_day > 1
    assert "not one round" in plan.passed_over[1].objections[0]


def test_bytes_are_those_of_the_protocol():
    """The vector goes up in 4 bytes a parameter; what is added does not depend on its length."""
    large, small = (plan_device(asked(epsilon=math.inf), costs(configuration(n, 1))).chosen for n in (200_000, 100_000))
    assert large.bytes_up - small.bytes_up == 400_000
    assert large.bytes_down - small.bytes_down == 400_000
    assert small.bytes_up > 400_000


@pytest.mark.parametrize(
    ("change", "would_do"),
    [
        ({"memory_bytes": 10}, "--memory 1kB"),
        ({"bytes_per_day": 10.0}, "--bandwidth"),
        ({"bytes_per_day": 10.0, "memory_bytes": 10}, "--memory 1kB with --bandwidth"),
    ],
)
def test_where_nothing_fits_the_hint_says_what_would_and_it_does(change, would_do):
    with pytest.raises(ConfigError, match="no configuration fits") as caught:
        plan_device(asked(**change), THREE)
    assert would_do in caught.value.hint


def test_where_each_limit_alone_can_be_met_but_not_both_the_hint_names_either_way():
    both = costs(configuration(10_000, 1_000), configuration(1_000, 9_000))
    traffic = plan_device(asked(memory_bytes=9_000), costs(configuration(1_000, 9_000))).chosen.bytes_per_round
    with pytest.raises(ConfigError) as caught:
        plan_device(asked(memory_bytes=2_000, bytes_per_day=traffic + 1.0), both)
    assert "--memory 9kB, or --bandwidth" in caught.value.hint
    assert plan_device(asked(memory_bytes=9_000, bytes_per_day=traffic + 1.0), both).chosen.trained_parameters == 1_000


def test_the_shipped_costs_answer_the_question_of_the_documents():
    result = RUNNER.invoke(app, ["plan", "--memory", "512MB", "--bandwidth", "10MB/day", "--epsilon", "4", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["schema"] == "fedpt-secure/device-plan/1"
    assert plan["chosen"]["private_bytes"] <= 512e6
    assert plan["chosen"]["bytes_up"] + plan["chosen"]["bytes_down"] <= 10e6
    assert plan["measured"]["command"].startswith("python benchmarks/overhead.py")
    people = RUNNER.invoke(app, ["plan", "--memory", "512MB", "--bandwidth", "10MB/day"])
    flat = " ".join(people.stdout.split())
    assert people.exit_code == 0
    for part in ("fedpt-secure train --epsilon 4", "memory:", "bandwidth:", "time:", "privacy:", "Measured by"):
        assert part in flat


def test_the_shipped_costs_say_what_would_fit_a_device_that_is_too_small():
    refused = RUNNER.invoke(app, ["plan", "--memory", "64MB", "--bandwidth", "1kB/day"])
    assert refused.exit_code == 2
    flat = " ".join(refused.stderr.split())
    hint = flat.split("this would do: ")[1].split(";")[0].replace(" with ", " ").split()
    accepted = RUNNER.invoke(app, ["plan", *hint])
    assert accepted.exit_code == 0, accepted.output


@pytest.mark.parametrize(
    "options",
    [
        ("--memory", "512", "--bandwidth", "1MB/day"),
        ("--memory", "1GB", "--bandwidth", "1MB"),
        ("--memory", "1GB", "--bandwidth", "1MB/day", "--epsilon", "0"),
    ],
)
def test_bad_settings_are_refused(options):
    assert RUNNER.invoke(app, ["plan", *options]).exit_code == 2


def test_damaged_costs_are_an_error(monkeypatch, tmp_path):
    (tmp_path / "device_costs.json").write_text('{"schema": "fedpt-secure/device-costs/1"}')
    monkeypatch.setattr(device_plan.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="damaged"):
        DeviceCosts.load()
