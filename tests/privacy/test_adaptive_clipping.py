"""The clip norm finds the quantile it looks for, and what that costs is in the sensitivity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy import InsecureDeterministicRandom, QuantileClipping

UNITS = 500


def rule(**changes):
    constants = {"quantile": 0.5, "learning_rate": 0.2, "weight": 0.2, "smallest": 1e-3, "largest": 1e3}
    return QuantileClipping(**{**constants, **changes})


def norms(seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=UNITS))


def followed(quantile_rule, start, *, noise_multiplier=0.0, rounds=200, factor=1.0):
    """The share of norms at or below the clip norm, over the rounds, from a noised coordinate."""
    noise = InsecureDeterministicRandom(1, "adaptive clipping").gaussian(
        rounds, standard_deviation=noise_multiplier * quantile_rule.unit_norm
    )
    values, clip_norm, below = norms(), start, []
    for index in range(rounds):
        below.append(float((values <= clip_norm).mean()))
        coordinate = quantile_rule.coordinate(values, clip_norm) + noise[index]
        clip_norm = quantile_rule.next_clip_norm(clip_norm, coordinate, expected_units=factor * UNITS)
    return np.array(below), clip_norm


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_without_noise_it_converges_to_the_true_quantile(quantile, start):
    below, clip_norm = followed(rule(quantile=quantile), start, rounds=1000)
    assert abs(below[-1] - quantile) <= 2 / UNITS
    assert clip_norm == pytest.approx(np.quantile(norms(), quantile), rel=0.05)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_with_noise_it_stays_within_a_tenth_of_the_quantile(quantile):
    """Noise multiplier 4 on a sum of 500: the count's own noise is 4 / 0.2 / 500 = 4 %."""
    below, _ = followed(rule(quantile=quantile), 1.0, noise_multiplier=4.0, rounds=400)
    assert np.abs(below[200:] - quantile).max() < 0.1


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_poor_public_estimate_of_the_count_changes_the_speed_and_not_the_goal(factor):
    below, _ = followed(rule(), 0.05, rounds=2000, factor=factor)
    assert abs(below[-100:].mean() - 0.5) < 0.02


@settings(max_examples=200, deadline=None)
@given(clip_norm=st.floats(1e-3, 1e3), coordinate=st.floats(-1e9, 1e9), units=st.floats(0.1, 1e6))
def test_it_moves_by_at_most_the_learning_rate_and_never_leaves_its_range(clip_norm, coordinate, units):
    moved = rule().next_clip_norm(clip_norm, coordinate, expected_units=units)
    assert 1e-3 <= moved <= 1e3
    assert abs(math.log(moved / clip_norm)) <= 0.2 + 1e-9


def test_too_many_units_below_shrink_it_and_too_few_let_it_grow():
    assert rule().next_clip_norm(1.0, 10.0, expected_units=100) < 1.0
    assert rule().next_clip_norm(1.0, -10.0, expected_units=100) > 1.0
    assert rule().next_clip_norm(1.0, 0.0, expected_units=100) == 1.0


def worst_unit(quantile_rule):
    """The longest vector that one unit can add, gradient and indicator: it is clipped, or just not."""
    below = quantile_rule.coordinate(np.array([1.0]), 1.0)
    above = quantile_rule.coordinate(np.array([math.inf]), 1.0)
    return max(math.hypot(1.0, below), math.hypot(1.0, above))


CONSTANTS = [(0.5, 0.2), (0.1, 0.2), (0.9, 0.2), (0.7, 2.0)]


@pytest.mark.parametrize(("quantile", "weight"), CONSTANTS)
def test_its_whole_cost_is_in_the_unit_norm(quantile, weight):
    made = rule(quantile=quantile, weight=weight)
    assert worst_unit(made) == pytest.approx(made.unit_norm, rel=1e-12)
    assert made.unit_norm == pytest.approx(math.sqrt(1 + (weight * max(quantile, 1 - quantile)) ** 2), rel=1e-12)


@pytest.mark.parametrize(("quantile", "weight"), CONSTANTS)
def test_an_indicator_left_out_of_the_unit_norm_would_be_noticed(quantile, weight):
    """The broken variant, noise for the gradient alone: a unit reaches beyond it."""
    assert worst_unit(rule(quantile=quantile, weight=weight)) > 1.0 + 1e-3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), max_size=30), st.floats(1e-3, 1e3), st.floats(0.01, 0.99))
def test_one_unit_moves_the_coordinate_by_at_most_its_share_of_the_unit_norm(values, clip_norm, quantile):
    made = rule(quantile=quantile)
    whole = made.coordinate(np.array(values), clip_norm)
    without = made.coordinate(np.array(values[1:]), clip_norm)
    assert math.hypot(1.0, whole - without) <= made.unit_norm * (1 + 1e-9)


def test_no_units_give_zero():
    assert rule().coordinate(np.array([]), 1.0) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantile": 0.0}, "clip quantile"),
        ({"quantile": 1.0}, "clip quantile"),
        ({"quantile": math.nan}, "clip quantile"),
        ({"smallest": 0.0}, "no range above 0"),
        ({"smallest": -1.0}, "no range above 0"),
        ({"smallest": 2e3}, "no range above 0"),
        ({"largest": math.inf}, "no range above 0"),
        ({"largest": math.nan}, "no range above 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"weight": 0.0}, "weight"),
        ({"weight": -0.1}, "weight"),
        ({"weight": math.nan}, "weight"),
    ],
)
def test_constants_that_are_no_rule_are_refused(changes, message):
    with pytest.raises(PrivacyError, match=message):
        rule(**changes)
