"""The accountant against other accountants, closed forms and published numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy import GaussianSteps, calibrate_noise, epsilon_spent, round_up
from fedpt_secure.privacy.accounting import merge


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, Theorem 8, for `steps` Gaussian mechanisms: one with mu = sqrt(steps) / sigma."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return float(brentq(excess, 0, 200))


def rdp_epsilon(spent: GaussianSteps, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    step = PoissonSampledDpEvent(spent.sampling_rate, GaussianDpEvent(spent.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, spent.steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.8, 1), (1.1, 1), (3.0, 8), (6.0, 40), (20.0, 100)])
def test_full_batch_steps_cost_what_the_closed_form_of_the_gaussian_mechanism_says(noise_multiplier, steps):
    exact = gaussian_epsilon(noise_multiplier, steps, 1e-5)
    bound = epsilon_spent((GaussianSteps(noise_multiplier, 1.0, steps),), delta=1e-5)
    assert exact <= bound <= exact * 1.001 + 1e-4


def test_a_published_setting_costs_what_others_computed():
    # RDP 2.101, Opacus PRV 1.838, dp-accounting PLD 1.828 (docs/privacy.md); GDP's 1.618 is an underestimate.
    bound = epsilon_spent((GaussianSteps(1.0, 0.01, 1000),), delta=1e-5)
    assert bound == pytest.approx(1.828, abs=2e-3)


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")
@pytest.mark.parametrize("sampling_rate", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.8, 10), (1.5, 50), (4.0, 300)])
def test_two_other_accountants_agree(sampling_rate, noise_multiplier, steps):
    """PRV (Opacus) within 2 % + 0.02, which is its own error bound; RDP is never below."""
    from opacus.accountants import PRVAccountant

    spent = GaussianSteps(noise_multiplier, sampling_rate, steps)
    bound = epsilon_spent((spent,), delta=1e-5)
    prv = PRVAccountant()
    prv.history = [(noise_multiplier, sampling_rate, steps)]
    assert prv.get_epsilon(1e-5, eps_error=0.01) == pytest.approx(bound, rel=0.02, abs=0.02)
    assert bound <= rdp_epsilon(spent, 1e-5)


@pytest.mark.filterwarnings("ignore:GDP accounting:UserWarning")
def test_an_accountant_that_underestimates_would_be_noticed():
    """Opacus's Gaussian-DP accountant lies below ours by more than the tolerance the comparison allows."""
    from opacus.accountants import GaussianAccountant

    gdp = GaussianAccountant()
    gdp.history = [(1.0, 0.01, 1000)]
    bound = epsilon_spent((GaussianSteps(1.0, 0.01, 1000),), delta=1e-5)
    assert gdp.get_epsilon(1e-5) < bound * 0.95


@settings(deadline=None, max_examples=6)
@given(
    epsilon=st.floats(0.2, 12),
    sampling_rate=st.sampled_from([0.05, 0.3, 1.0]),
    steps=st.integers(1, 60),
)
def test_calibrated_noise_keeps_the_promise_and_a_little_less_would_not(epsilon, sampling_rate, steps):
    multiplier = calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=sampling_rate, steps=steps)
    assert epsilon_spent((GaussianSteps(multiplier, sampling_rate, steps),), delta=1e-5) <= epsilon
    if multiplier > 0.21:
        less = GaussianSteps(multiplier * 0.99, sampling_rate, steps)
        assert epsilon_spent((less,), delta=1e-5) > epsilon * 0.999


def test_splitting_a_history_does_not_change_its_cost():
    whole = epsilon_spent((GaussianSteps(2.0, 0.5, 8),), delta=1e-5)
    parts = epsilon_spent((GaussianSteps(2.0, 0.5, 3), GaussianSteps(2.0, 0.5, 5)), delta=1e-5)
    assert parts == whole
    assert merge((GaussianSteps(2.0, 0.5, 3), GaussianSteps(2.0, 0.5, 5))) == (GaussianSteps(2.0, 0.5, 8),)


def test_different_mechanisms_add_up_to_more_than_either():
    one, other = GaussianSteps(2.0, 0.5, 3), GaussianSteps(3.0, 1.0, 2)
    both = epsilon_spent((one, other), delta=1e-5)
    assert both > max(epsilon_spent((one,), delta=1e-5), epsilon_spent((other,), delta=1e-5))


def test_no_noise_is_infinite_and_no_step_is_free():
    assert epsilon_spent((GaussianSteps(0.0, 0.5, 1),), delta=1e-5) == math.inf
    assert epsilon_spent((GaussianSteps(1.0, 0.5, 0),), delta=1e-5) == 0.0
    assert epsilon_spent((), delta=1e-5) == 0.0
    assert calibrate_noise(epsilon=math.inf, delta=1e-5, sampling_rate=1.0, steps=3) == 0.0


def test_what_cannot_be_met_is_refused_with_what_would():
    with pytest.raises(PrivacyError, match="cannot be met") as caught:
        calibrate_noise(epsilon=1e-4, delta=1e-9, sampling_rate=1.0, steps=1_000_000)
    assert "epsilon >=" in caught.value.hint


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_spent((GaussianSteps(1.0, 1.0, 1),), delta=delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_an_impossible_epsilon_is_refused(epsilon):
    with pytest.raises(PrivacyError, match="epsilon"):
        calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=1.0, steps=1)


@given(st.floats(0, 1e6))
def test_printed_epsilons_are_never_rounded_down(epsilon):
    assert round_up(epsilon) >= epsilon
