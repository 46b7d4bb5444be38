"""A plan says what a run of the same numbers would state, and refuses what no run could promise."""

from __future__ import annotations

import json
import math

import pytest

from fedpt_secure.config import build
from fedpt_secure.errors import ConfigError, PrivacyError
from fedpt_secure.privacy import GaussianSteps, calibrate_noise, epsilon_spent
from fedpt_secure.report import PlanConfig, check_figure_path, plan_privacy, write_figure
from fedpt_secure.report import plan as plan_module

RING = {"mode": "distributed", "cohort": 30, "survivors": 20, "corrupt": 4}


def asked(answer):
    return next(row for row in answer.rows if row.asked)


def answer(**changes):
    return plan_privacy(build(PlanConfig, {"rounds": 4, "rate": 0.2, **changes}, command="account"))


@pytest.fixture(autouse=True)
def _short_table(monkeypatch):
    monkeypatch.setattr("fedpt_secure.report.plan.TABLE_EPSILONS", (8.0,))


def test_the_noise_is_what_calibration_says_and_the_statement_keeps_the_promise():
    made = answer(epsilon=3.0, local_steps=2)
    multiplier = calibrate_noise(epsilon=3.0, delta=1e-5, sampling_rate=0.2, steps=8)
    assert asked(made).noise_multiplier == asked(made).share == multiplier
    assert asked(made).gain == 1.0
    assert made.statement.epsilon <= 3.0
    assert made.statement.steps == 8


def test_the_reverse_gives_the_epsilon_back():
    multiplier = calibrate_noise(epsilon=3.0, delta=1e-5, sampling_rate=0.2, steps=4)
    made = answer(noise_multiplier=multiplier)
    assert 2.98 < made.statement.epsilon <= 3.0
    assert asked(made).epsilon == made.statement.epsilon


def test_rows_are_sorted_and_hold_the_asked_one_once():
    made = answer(epsilon=3.0)
    assert [(row.epsilon, row.asked) for row in made.rows] == [(3.0, True), (8.0, False)]
    assert [row.epsilon for row in answer(epsilon=8.0).rows] == [8.0]


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_honest_survivors_together_have_the_noise_and_rounding_is_paid_for(mode):
    """16 honest survivors at least: a share is a quarter of the noise, and a little more for the rounding."""
    made = answer(epsilon=3.0, **{**RING, "mode": mode})
    row = asked(made)
    assert row.noise_multiplier / 4 < row.share < row.noise_multiplier / 4 * 1.05
    assert 4 / 1.05 < row.gain < 4
    assert row.gain == pytest.approx(row.noise_multiplier / row.share)
    assert made.statement.epsilon <= 3.0
    assert made.statement.unit.startswith("client" if mode == "client" else "single record")


def test_shares_sized_for_all_survivors_would_break_the_promise_when_some_collude():
    """The broken variant: colluders know their own shares, so that they hide nothing from themselves."""
    made = answer(epsilon=3.0, **RING)
    naive = asked(answer(epsilon=3.0, **{**RING, "corrupt": 0})).share
    left = naive * math.sqrt(16)
    assert epsilon_spent((GaussianSteps(left, 0.2, 4),), delta=1e-5) > 3.0
    assert epsilon_spent((GaussianSteps(asked(made).share * math.sqrt(16), 0.2, 4),), delta=1e-5) <= 3.0


def test_defaults_of_the_cohort_are_those_of_a_run():
    config = build(PlanConfig, {"epsilon": 1.0, "rounds": 1, "mode": "client", "cohort": 30})
    assert (config.agreed_survivors, config.tolerated, config.honest_survivors) == (21, 3, 18)


def test_no_noise_promises_nothing():
    made = answer(noise_multiplier=0.0)
    assert made.statement.claim().startswith("NOT PRIVATE")
    assert asked(made).epsilon == math.inf
    content = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert [row["epsilon"] for row in content["rows"]] == [8.0, None]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, "one of them"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "one of them"),
        ({"epsilon": 0.0}, "greater than 0"),
        ({"epsilon": -1.0}, "greater than 0"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"epsilon": 1.0, "rate": 0.0}, "rate"),
        ({"epsilon": 1.0, "rate": 1.01}, "rate"),
        ({"epsilon": 1.0, "rate": math.nan}, "rate"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"epsilon": 1.0, "delta": math.nan}, "delta"),
        ({"epsilon": 1.0, "delta": 1e-13}, "delta"),
        ({"epsilon": 1.0, "rounds": 0}, "rounds"),
        ({"epsilon": 1.0, "local_steps": 0}, "local_steps"),
        ({"epsilon": 1.0, "mode": "global"}, "mode"),
        ({"epsilon": 1.0, "cohort": 10}, "own noise suffices"),
        ({"epsilon": 1.0, "mode": "distributed"}, "cohort is needed"),
        ({"epsilon": 1.0, **RING, "local_steps": 2}, "one noised release"),
        ({"epsilon": 1.0, **RING, "survivors": 31}, "above the cohort"),
        ({"epsilon": 1.0, **RING, "clients": 30}, "the unit is a record"),
        ({"epsilon": 1.0, **RING, "mode": "client", "records": 30}, "the unit is a client"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_with_the_rule(changes, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        answer(**changes)
    assert "account --help" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"records": 100_000}, "1/100000, one over the largest client's records"),
        ({**RING, "records": 100_000}, "one over all records"),
        ({**RING, "mode": "client", "clients": 200_000}, "one over the clients"),
        ({**RING, "survivors": 4, "corrupt": 4}, "nobody whose noise counts"),
        ({**RING, "ring_bits": 16}, "ring of 16 bits is too small"),
    ],
)
def test_what_no_run_could_promise_is_refused_with_a_way_out(changes, rule):
    with pytest.raises(PrivacyError, match=rule) as caught:
        answer(epsilon=1.0, **changes)
    assert caught.value.hint


def test_delta_just_below_one_over_the_records_is_accepted():
    assert answer(epsilon=1.0, records=99_999).statement.private


def test_a_line_of_the_table_that_cannot_be_had_says_so(monkeypatch):
    monkeypatch.setattr(plan_module, "TABLE_EPSILONS", (1e-4,))
    made = answer(epsilon=8.0, rounds=100_000, rate=1.0, delta=1e-9)
    assert made.rows[0] == plan_module.PlanRow(1e-4, None, None, None, asked=False)


def test_curves_fall_with_noise_rise_with_rounds_and_meet_what_was_asked():
    made = answer(epsilon=3.0)
    points = plan_module.curves(made)
    by_noise, by_rounds = ([epsilon for _, epsilon in curve] for curve in (points.by_noise, points.by_rounds))
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_rounds == sorted(by_rounds)
    at_asked = dict(points.by_noise)[asked(made).noise_multiplier]
    assert 2.9 < at_asked < 3.1
    assert dict(points.by_rounds)[4] == at_asked


def test_the_plot_states_the_promise_and_repeats_byte_for_byte(tmp_path):
    made = answer(epsilon=3.0)
    for name in ("a.svg", "b.svg", "c.png"):
        write_figure(made, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert f"epsilon &lt;= {made.statement.epsilon}" in drawn
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_a_promise_or_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="svg or"):
        check_figure_path(tmp_path / "plot.jpeg")
    with pytest.raises(PrivacyError, match="nothing to plot"):
        write_figure(answer(noise_multiplier=0.0), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_more_colluders_than_secure_aggregation_withstands_are_refused():
    settings = {"mode": "distributed", "epsilon": 4.0, "cohort": 20, "rounds": 2}
    plan_privacy(build(PlanConfig, settings | {"corrupt": 7}, command="account"))
    with pytest.raises(PrivacyError, match="withstands 7"):
        plan_privacy(build(PlanConfig, settings | {"corrupt": 8}, command="account"))
