"""The one-run bound: a published value, its validity on correct mechanisms, and its power on broken ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fedpt_secure.attacks.one_run import (
    FRACTIONS,
    analyse_canaries,
    detectable_epsilon,
    epsilon_lower_bound,
    guess_counts,
    p_value,
    right_guesses,
)


def test_the_p_value_is_the_published_one():
    """As in jax-privacy's tests: m 1000, r 600, all right, epsilon 4, delta 1e-5."""
    found = p_value(canaries=1000, guesses=600, correct=600, epsilon=4.0, delta=1e-5)
    assert found == pytest.approx(0.00126256, abs=5e-9)


def test_with_delta_0_the_p_value_is_a_binomial_tail():
    assert p_value(canaries=10, guesses=3, correct=3, epsilon=0.0, delta=0.0) == pytest.approx(1 / 8)
    assert p_value(canaries=10, guesses=3, correct=0, epsilon=1.0, delta=0.0) == 1.0


def test_no_bound_is_infinite_and_about_3_e_to_the_epsilon_right_guesses_are_needed():
    for epsilon, needed in ((2.0, 24), (4.0, 166)):
        bounds = [
            epsilon_lower_bound(canaries=n, guesses=n, correct=n, delta=0.0, alpha=0.05) for n in (needed, needed - 2)
        ]
        assert bounds[0] > epsilon > bounds[1]
    assert math.isfinite(epsilon_lower_bound(canaries=10**6, guesses=10**6, correct=10**6, delta=0.0, alpha=0.05))


@given(st.integers(2, 300), st.data())
def test_the_bound_grows_with_right_guesses_and_never_passes_what_could_be_detected(guesses, data):
    correct = data.draw(st.integers(0, guesses))
    settings = {"canaries": guesses, "guesses": guesses, "delta": 1e-5, "alpha": 0.05}
    bound = epsilon_lower_bound(correct=correct, **settings)
    assert bound <= epsilon_lower_bound(correct=guesses, **settings)
    assert correct > guesses / 2 or bound == 0.0


def test_the_numbers_of_guesses_are_five_fixed_fractions():
    assert guess_counts(1000) == (50, 100, 200, 500, 1000)
    assert all(count % 2 == 0 for count in guess_counts(333))
    assert guess_counts(1) == ()
    assert len(FRACTIONS) == 5


def test_guesses_are_taken_from_both_ends():
    scores, included = np.arange(10.0), np.arange(10) >= 5
    assert right_guesses(scores, included, 10) == 10
    assert right_guesses(-scores, included, 4) == 0
    assert right_guesses(np.zeros(10), included, 4) == 4  # ties by position, whatever the coins


def epsilon_of(mu, delta):
    """The exact epsilon of a Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""
    low, high = 0.0, 60.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        spent = norm.cdf(mu / 2 - middle / mu) - math.exp(middle) * norm.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def simulated(mu, canaries, rng):
    """Scores of coins behind a Gaussian mechanism, one dimension a canary: the best case for the auditor."""
    included = rng.random(canaries) < 0.5
    return included * mu + rng.normal(size=canaries), included


@pytest.mark.parametrize(
    ("mu", "audits"),
    [(1.0, 50), *(pytest.param(mu, 1000, marks=pytest.mark.slow) for mu in (0.25, 1.0, 2.0))],
)
def test_on_a_correct_mechanism_the_bound_misses_no_more_often_than_alpha(mu, audits):
    """At alpha 0.2 and the nominal rate, more misses than allowed would come with a chance below 1e-3."""
    rng = np.random.default_rng(11)
    true = epsilon_of(mu, 1e-5)
    missed = 0
    for _ in range(audits):
        scores, included = simulated(mu, 200, rng)
        p_values = [
            p_value(canaries=200, guesses=r, correct=right_guesses(scores, included, r), epsilon=true, delta=1e-5)
            for r in guess_counts(200)
        ]
        missed += min(p_values) < 0.2 / len(FRACTIONS)
    assert missed <= binom.isf(1e-3, audits, 0.2)


@given(st.integers(2, 400), st.data())
def test_looking_at_fewer_steps_does_not_change_the_p_value(guesses, data):
    correct = data.draw(st.integers(1, guesses))
    epsilon = data.draw(st.floats(0, 6))
    q = 1 / (1 + math.exp(-epsilon))
    steps = np.arange(1, correct + 1)
    tail = binom.sf(correct - 1, guesses, q)
    whole = tail + 2 * 500 * 1e-5 * ((binom.sf(correct - steps - 1, guesses, q) - tail) / steps).max()
    found = p_value(canaries=500, guesses=guesses, correct=correct, epsilon=epsilon, delta=1e-5)
    assert found == pytest.approx(min(1.0, whole), abs=1e-12)


def test_no_noise_and_a_quarter_of_it_are_always_found_half_of_it_is_not():
    """RESEARCH: with 1,000 canaries and a claim of 3.34 (mu 0.8)."""
    rng = np.random.default_rng(5)
    claimed = 3.34
    mu = next(mu for mu in np.arange(0.3, 2, 0.01) if epsilon_of(mu, 1e-5) > claimed)

    def found(factor):
        bounds = []
        for _ in range(4):
            scores, included = simulated(mu * factor, 1000, rng)
            bounds.append(
                analyse_canaries(scores, included, delta=1e-5, alpha=0.05, claimed=None)["epsilon_lower_bound"]
            )
        return [bound > claimed for bound in bounds]

    assert all(found(1e3))
    assert all(found(4))
    assert not any(found(2))
    assert not any(found(1))


def test_a_hundred_canaries_cannot_contradict_epsilon_4():
    assert (
        detectable_epsilon(canaries=100, delta=1e-5, alpha=0.05)
        < 4
        < detectable_epsilon(canaries=1000, delta=1e-5, alpha=0.05)
    )


def test_without_both_coins_there_are_no_curves_but_still_a_bound():
    found = analyse_canaries(np.arange(4.0), np.ones(4, dtype=bool), delta=1e-5, alpha=0.05, claimed=1.0)
    assert found["roc"] is None
    assert found["epsilon_lower_bound"] == 0.0
