"""Figures of merit against exact references and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from fedpt_secure.attacks.operating_points import analyse, auc, ceiling, clopper_pearson, histogram, roc


@pytest.mark.parametrize(("count", "trials"), [(0, 10), (3, 10), (10, 10), (1, 1000)])
def test_clopper_pearson_is_scipys_exact_interval(count, trials):
    exact = binomtest(count, trials).proportion_ci(0.9, method="exact")
    assert clopper_pearson(count, trials, alpha=0.1) == pytest.approx((exact.low, exact.high))


def test_no_false_positive_in_n_bounds_the_rate_by_three_over_n():
    assert clopper_pearson(0, 300, alpha=0.1)[1] < 3 / 300
    assert clopper_pearson(0, 0, alpha=0.05) == (0.0, 1.0)


def test_the_auc_is_the_chance_that_a_member_outscores():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 400), rng.normal(0, 1, 300)
    members[:50] = others[:50]
    pairs = np.sign(members[:, None] - others[None]) / 2 + 0.5
    assert auc(members, others)["value"] == pytest.approx(pairs.mean())


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_the_auc_interval_covers_the_true_area(shift):
    """500 samples: 95 % are meant to cover; fewer than 92 % do with a chance below 2e-3 (fixed seed)."""
    rng = np.random.default_rng(3)
    true = norm.cdf(shift / math.sqrt(2))
    covered = 0
    for _ in range(500):
        found = auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 60))
        covered += found["low"] <= true <= found["high"]
    assert covered >= 460


def test_classes_that_do_not_overlap_have_an_interval_all_the_same():
    found = auc(np.arange(10.0) + 100, np.arange(20.0))
    assert found["value"] == found["high"] == 1.0
    assert 0.6 < found["low"] < 0.75


@given(st.floats(0, 1), st.floats(0.01, 10), st.floats(0, 0.1))
def test_the_ceiling_is_a_rate_and_grows_with_epsilon(fpr, epsilon, delta):
    lower, higher = (ceiling(fpr, epsilon=e, delta=delta) for e in (epsilon, epsilon + 1))
    assert 0 <= lower <= higher + 1e-12 <= 1 + 1e-12
    assert lower >= min(1.0, fpr) - 1e-9
    assert ceiling(fpr, epsilon=None, delta=delta) == 1.0


def test_the_ceiling_holds_the_best_attack_on_a_gaussian_mechanism():
    """mu = 1 at its own (epsilon, delta): Balle and Wang's curve touches, and must not pass."""
    mu, epsilon = 1.0, 2.0
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    for fpr in np.logspace(-5, -0.01, 50):
        best = norm.cdf(norm.ppf(fpr) + mu)
        assert best <= ceiling(float(fpr), epsilon=epsilon, delta=delta) + 1e-12


def test_roc_points_run_from_corner_to_corner_and_thinning_keeps_both():
    rng = np.random.default_rng(1)
    curve = roc(rng.normal(1, 1, 3000), rng.normal(0, 1, 3000))
    fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert len(fpr) <= 401
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


def test_a_histogram_counts_every_score():
    rng = np.random.default_rng(1)
    found = histogram(rng.normal(0, 1, 100), rng.normal(0, 1, 80))
    assert sum(found["members"]) == 100
    assert sum(found["non_members"]) == 80
    assert len(found["edges"]) == len(found["members"]) + 1
    assert sum(histogram(np.zeros(5), np.zeros(5))["members"]) == 5


def test_scores_without_signal_stay_below_the_ceiling_and_perfect_ones_pass_it():
    rng = np.random.default_rng(4)
    silent = analyse(rng.normal(size=400), rng.normal(size=400), epsilon=0.5, delta=1e-5, rng=rng)
    assert not any(point["above_ceiling"] for point in silent["at_fpr"])
    assert abs(silent["balanced_accuracy"]["value"] - 0.5) < 0.1
    perfect = analyse(rng.normal(9, 1, 400), rng.normal(size=400), epsilon=0.5, delta=1e-5, rng=rng)
    assert all(point["above_ceiling"] for point in perfect["at_fpr"])
    assert perfect["balanced_accuracy"]["value"] > 0.99
    assert [point["resolvable"] for point in perfect["at_fpr"]] == [True, False]
