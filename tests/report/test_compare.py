"""Two runs side by side: only what differs, and a difference of gains only on the same records."""

from __future__ import annotations

import json

import pytest

from fedpt_secure.errors import ConfigError
from fedpt_secure.report import compare_runs, load_run


def test_the_settings_that_differ_are_named_and_no_others(runs):
    made = compare_runs(load_run(runs["private"], "private"), load_run(runs["bare"], "bare"))
    assert made.settings == (("privacy.epsilon", "4.0", "inf"),)
    assert {row[0]: row[1:] for row in made.rows}["epsilon stated"][1] == "nothing is promised"
    json.dumps(made.to_json(), allow_nan=False)


def test_the_difference_of_gains_is_exact_and_its_interval_is_wider_than_either(runs):
    records = [load_run(runs[name], name) for name in ("private", "bare")]
    value, low, high = compare_runs(*records).gain_difference
    gains = [record.summary["improvement"] for record in records]
    assert value == gains[1]["loss"] - gains[0]["loss"]
    assert low <= value <= high
    assert high - low >= max(gain["ci"][1] - gain["ci"][0] for gain in gains)


def test_losses_on_other_records_are_not_compared(runs, change_json):
    change_json(runs["bare"] / "summary.json", evaluation={"records": 9, "tokens": 80, "confidence": 0.95})
    made = compare_runs(load_run(runs["private"], "a"), load_run(runs["bare"], "b"))
    assert made.same_records is False
    assert made.gain_difference is None


def test_a_run_is_not_compared_with_itself(runs):
    run = load_run(runs["private"], "a")
    with pytest.raises(ConfigError, match="twice"):
        compare_runs(run, run)
