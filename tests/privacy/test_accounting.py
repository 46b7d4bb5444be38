"""The accountant against other accountants, closed forms and published numbers.

An epsilon that is printed must be an upper bound and hardly more. `REFERENCES` holds, for a grid of histories, a
certain lower bound of the true epsilon and the most that we may print:

- one step, sampled or not: the exact hockey-stick divergence, both directions (add, remove), by the closed form of the
  privacy loss; at rate 1 it is Balle and Wang 2018, Theorem 8, which also covers many steps;
- many sampled steps: Opacus's PRV accountant (Gopi, Lee and Wutschitz 2021), whose answer comes with bounds on its own
  error.

`TOLERANCE` and the slack a step are what we allow ourselves above the upper one.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy import GaussianSteps, accounting, calibrate_noise, epsilon_spent, round_up
from fedpt_secure.privacy.accounting import SLACK_PER_STEP, merge

TOLERANCE = 0.003
"""Relative; on top of it `SLACK_PER_STEP` and its weight on delta, together below 1.5e-6 a step."""
PRV_ERROR = 0.01
"""Of Opacus's PRV accountant: its answer lies within this of the true epsilon."""


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, Theorem 8, for `steps` Gaussian mechanisms: one with mu = sqrt(steps) / sigma."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return norm.cdf(mu / 2 - epsilon / mu) - tail - delta

    return float(brentq(excess, 0, 400, xtol=1e-12))


def one_sampled_step(spent: GaussianSteps, delta: float, *, directions=("add", "remove")) -> float:
    """Exact epsilon of one Poisson-sampled Gaussian, with P = (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2).

    log(P/Q) = log(1 - q + q exp((2 x - 1) / (2 s^2))) grows with x, so that both divergences are Gaussian tails.
    """
    q, s = spent.sampling_rate, spent.noise_multiplier

    def border(ratio: float) -> float:
        return s * s * math.log((ratio - (1 - q)) / q) + 0.5

    def mixture(tail, x: float) -> float:
        return (1 - q) * tail(x / s) + q * tail((x - 1) / s)

    def divergence(epsilon: float) -> float:
        found = 0.0
        if "remove" in directions:
            x = border(math.exp(epsilon))
            found = mixture(norm.sf, x) - math.exp(epsilon) * norm.sf(x / s)
        if "add" in directions and math.exp(-epsilon) > 1 - q:
            x = border(math.exp(-epsilon))
            found = max(found, norm.cdf(x / s) - math.exp(epsilon) * mixture(norm.cdf, x))
        return found - delta

    return float(brentq(divergence, 1e-9, 100, xtol=1e-12)) if divergence(1e-9) > 0 else 0.0


def prv_bounds(spent: GaussianSteps, delta: float) -> tuple[float, float]:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(spent.noise_multiplier, spent.sampling_rate, spent.steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it asks for more RDP orders where it sizes its grid
        discrete = accountant._get_dprv(eps_error=PRV_ERROR, delta_error=delta / 1000)
    low, _, high = discrete.compute_epsilon(delta, delta / 1000, PRV_ERROR)
    return float(low), float(high)


def rdp_epsilons(spent: GaussianSteps, delta: float) -> dict[str, float]:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant
    from opacus.accountants import RDPAccountant

    google = RdpAccountant()
    step = PoissonSampledDpEvent(spent.sampling_rate, GaussianDpEvent(spent.noise_multiplier))
    google.compose(SelfComposedDpEvent(step, spent.steps))
    opacus = RDPAccountant()
    opacus.history = [(spent.noise_multiplier, spent.sampling_rate, spent.steps)]
    return {"dp-accounting": float(google.get_epsilon(delta)), "opacus": float(opacus.get_epsilon(delta))}


GAUSSIAN = [
    (GaussianSteps(sigma, 1.0, steps), delta)
    for sigma, steps, delta in [
        (0.8, 1, 1e-5),
        (1.1, 1, 1e-12),
        (3.0, 8, 1e-5),
        (6.0, 40, 1e-7),
        (20.0, 100, 1e-5),
        (150.0, 10_000, 1e-6),
    ]
]
SAMPLED_ONCE = [
    (GaussianSteps(sigma, rate, 1), delta)
    for sigma, rate, delta in [(0.6, 0.1, 1e-5), (1.0, 0.5, 1e-7), (2.0, 0.9, 1e-5), (0.8, 0.01, 1e-6)]
]
SAMPLED = [
    (GaussianSteps(sigma, rate, steps), delta)
    for rate in (0.001, 0.05, 0.5)
    for sigma, steps, delta in [(0.8, 20, 1e-5), (1.5, 300, 1e-7), (20.0, 10_000, 1e-5)]
]


@pytest.fixture(scope="module")
def references():
    """Rows of: history, delta, the least a sound accountant may say, the most a tight one may."""
    rows = [
        (spent, delta, *[gaussian_epsilon(spent.noise_multiplier, spent.steps, delta)] * 2) for spent, delta in GAUSSIAN
    ]
    rows += [(spent, delta, *[one_sampled_step(spent, delta)] * 2) for spent, delta in SAMPLED_ONCE]
    rows += [(spent, delta, *prv_bounds(spent, delta)) for spent, delta in SAMPLED]
    return rows


def complaints(references, accountant) -> list[str]:
    """What the references hold against an accountant: too small is a broken promise, too large a waste."""
    found = []
    for spent, delta, low, high in references:
        said = accountant(spent, delta)
        if said < low:
            found.append(f"unsound: {spent} at {delta:g} costs at least {low}, said {said}")
        if said > high * (1 + TOLERANCE) + 1e-4 + 1.5e-6 * spent.steps:
            found.append(f"loose: {spent} at {delta:g} costs at most {high}, said {said}")
    return found


def ours(spent: GaussianSteps, delta: float) -> float:
    return epsilon_spent((spent,), delta=delta)


def test_what_we_print_is_an_upper_bound_and_a_tight_one(references):
    assert complaints(references, ours) == []


def test_the_tolerance_covers_the_slack():
    assert SLACK_PER_STEP <= 1.5e-6


def _one_direction_only(spent, delta):
    return one_sampled_step(spent, delta, directions=("add",)) if spent.steps == 1 else ours(spent, delta)


BROKEN = {
    "forgets that removing a record is worse than adding one": (_one_direction_only, "unsound"),
    "counts one step too few": (lambda s, d: ours(replace(s, steps=s.steps - 1), d), "unsound"),
    "takes the standard deviation for the variance": (
        lambda s, d: ours(replace(s, noise_multiplier=max(0.2, s.noise_multiplier**0.5)), d),
        "loose",
    ),
    "takes the variance for the standard deviation": (
        lambda s, d: ours(replace(s, noise_multiplier=s.noise_multiplier**2), d),
        "unsound",
    ),
    "rounds down": (lambda s, d: math.floor(ours(s, d) * 1000) / 1000, "unsound"),
    "takes the rate twice": (lambda s, d: ours(replace(s, sampling_rate=s.sampling_rate**2), d), "unsound"),
    "forgets the amplification by sampling": (lambda s, d: ours(replace(s, sampling_rate=1.0), d), "loose"),
    "a tenth of delta": (lambda s, d: ours(s, d / 10), "loose"),
    "ten times delta": (lambda s, d: ours(s, d * 10), "unsound"),
    "adds epsilons up": (lambda s, d: s.steps * ours(replace(s, steps=1), d), "loose"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_an_accountant_with_a_mistake_would_be_noticed(references, mistake):
    broken, verdict = BROKEN[mistake]
    enough = {GaussianSteps(3.0, 1.0, 8), GaussianSteps(0.6, 0.1, 1), GaussianSteps(0.8, 0.05, 20)}
    few = [row for row in references if row[0] in enough]
    assert len(few) == len(enough)
    assert any(line.startswith(verdict) for line in complaints(few, broken))


@pytest.mark.filterwarnings("ignore:GDP accounting:UserWarning")
def test_opacus_gdp_accountant_would_be_noticed(references):
    """It rests on a central limit theorem and states less than the truth: RESEARCH saw 1.618 for 1.828."""
    from opacus.accountants import GaussianAccountant

    def gdp(spent, delta):
        accountant = GaussianAccountant()
        accountant.history = [(spent.noise_multiplier, spent.sampling_rate, spent.steps)]
        return float(accountant.get_epsilon(delta))

    sampled = [row for row in references if row[0].sampling_rate < 1 and row[0].steps > 1]
    assert any(line.startswith("unsound") for line in complaints(sampled, gdp))


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")
@pytest.mark.parametrize(("spent", "delta"), SAMPLED)
def test_no_renyi_accountant_is_tighter(spent, delta):
    slack = 1.5e-6 * spent.steps
    for name, epsilon in rdp_epsilons(spent, delta).items():
        assert ours(spent, delta) <= epsilon + slack, name


def test_a_published_setting_costs_what_others_computed():
    # RDP 2.101, Opacus PRV 1.838, dp-accounting PLD 1.828 (docs/privacy.md); GDP's 1.618 is an underestimate.
    bound = epsilon_spent((GaussianSteps(1.0, 0.01, 1000),), delta=1e-5)
    assert bound == pytest.approx(1.828, abs=2e-3)


NOISE, RATE, STEPS, DELTA = st.floats(0.5, 50), st.floats(1e-4, 1), st.integers(1, 2000), st.floats(1e-9, 1e-3)
NUMERICAL = 1 + 1e-3
"""Two neighbouring histories are seen through grids that round differently, by less than this."""


def quick(noise_multiplier, rate, steps, delta):
    return epsilon_spent((GaussianSteps(noise_multiplier, rate, steps),), delta=delta, excess=2.5e-4)


@settings(deadline=None, max_examples=5)
@given(NOISE, RATE, STEPS, DELTA, st.floats(1.05, 3))
def test_more_noise_fewer_steps_a_smaller_rate_or_a_larger_delta_never_cost_more(noise, rate, steps, delta, factor):
    base = quick(noise, rate, steps, delta)
    for less in (
        quick(noise * factor, rate, steps, delta),
        quick(noise, rate / factor, steps, delta),
        quick(noise, rate, max(1, int(steps / factor)), delta),
        quick(noise, rate, steps, delta * factor),
    ):
        assert less <= base * NUMERICAL + 1e-6


@settings(deadline=None, max_examples=6)
@given(st.lists(st.builds(GaussianSteps, NOISE, RATE, st.integers(0, 50)), min_size=2, max_size=4), st.randoms())
def test_the_order_of_releases_does_not_matter(history, random):
    shuffled = list(history)
    random.shuffle(shuffled)
    assert epsilon_spent(tuple(shuffled), delta=1e-5, excess=2.5e-4) == epsilon_spent(
        tuple(history), delta=1e-5, excess=2.5e-4
    )


FEW_STEPS = [GaussianSteps(0.8, 0.2, 4), GaussianSteps(0.5, 0.01, 30), GaussianSteps(4.0, 0.05, 2)]
MANY_STEPS = [GaussianSteps(1.0, 0.001, 10_000), GaussianSteps(1.27, 0.0266, 2148)]


def excess(spent: GaussianSteps, allowed: float) -> float:
    """By what part an epsilon lies above that of the finest grid."""
    return epsilon_spent((spent,), delta=1e-5, excess=allowed) / epsilon_spent((spent,), delta=1e-5, excess=0.0) - 1


@pytest.mark.parametrize("spent", FEW_STEPS + MANY_STEPS)
@pytest.mark.parametrize("allowed", [2.5e-6, 2.5e-4])
def test_a_coarser_grid_is_above_the_finest_and_costs_no_more_than_allowed(spent, allowed):
    assert -1e-9 <= excess(spent, allowed) <= allowed


@pytest.mark.parametrize("spent", FEW_STEPS + MANY_STEPS)
def test_one_grid_for_all_would_be_loose_for_some_and_needless_for_others(spent, monkeypatch):
    """The broken variant: the coarse grid that four steps may have is as good there, and far off for thousands."""
    monkeypatch.setattr(accounting, "_GRIDS", (1e-3,))
    coarse = accounting.epsilon_spent.__wrapped__((spent,), delta=1e-5)
    off = coarse / epsilon_spent((spent,), delta=1e-5, excess=0.0) - 1
    assert (off > 1e-4) == (spent in MANY_STEPS or spent == GaussianSteps(4.0, 0.05, 2))


def test_splitting_a_history_does_not_change_its_cost():
    whole = epsilon_spent((GaussianSteps(2.0, 0.5, 8),), delta=1e-5)
    parts = epsilon_spent((GaussianSteps(2.0, 0.5, 3), GaussianSteps(2.0, 0.5, 5)), delta=1e-5)
    assert parts == whole
    assert merge((GaussianSteps(2.0, 0.5, 3), GaussianSteps(2.0, 0.5, 5))) == (GaussianSteps(2.0, 0.5, 8),)


def test_different_mechanisms_add_up_to_more_than_either():
    one, other = GaussianSteps(2.0, 0.5, 3), GaussianSteps(3.0, 1.0, 2)
    both = epsilon_spent((one, other), delta=1e-5)
    assert both > max(epsilon_spent((one,), delta=1e-5), epsilon_spent((other,), delta=1e-5))


def test_different_gaussian_mechanisms_compose_as_the_closed_form_says():
    """mu^2 adds up: sigmas 2 and 3, 3 and 2 times."""
    mu = math.sqrt(3 / 4 + 2 / 9)
    exact = gaussian_epsilon(1 / mu, 1, 1e-5)
    assert exact <= epsilon_spent((GaussianSteps(2.0, 1.0, 3), GaussianSteps(3.0, 1.0, 2)), delta=1e-5) <= exact * 1.001


def test_a_large_epsilon_is_still_tight():
    """The loss outgrows the default grid; a coarser one keeps the bound, the time and the memory."""
    for sigma in (0.4, 0.25, 0.2):
        exact = gaussian_epsilon(sigma, 10, 1e-5)
        assert exact <= epsilon_spent((GaussianSteps(sigma, 1.0, 10),), delta=1e-5) <= exact * 1.001


@settings(deadline=None, max_examples=2)
@given(
    epsilon=st.floats(0.2, 12),
    sampling_rate=st.sampled_from([0.05, 0.3, 1.0]),
    steps=st.integers(1, 60),
)
def test_calibrated_noise_keeps_the_promise_and_a_little_less_would_not(epsilon, sampling_rate, steps):
    multiplier = calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=sampling_rate, steps=steps)
    assert epsilon_spent((GaussianSteps(multiplier, sampling_rate, steps),), delta=1e-5) <= epsilon
    if multiplier > 0.201:
        less = GaussianSteps(multiplier / 1.0011, sampling_rate, steps)
        assert epsilon_spent((less,), delta=1e-5) > epsilon


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(1.0, 1e-3, 10_000), (50.0, 0.1, 100)])
def test_calibration_takes_seconds_and_says_nothing(epsilon, rate, steps, caplog, capfd):
    """Warnings are errors in these tests. CPU time, so that a busy machine raises no false alarm; 1 to 5 s measured."""
    began = time.process_time()
    multiplier = calibrate_noise(epsilon=epsilon, delta=1e-6, sampling_rate=rate, steps=steps)
    assert time.process_time() - began < 40
    assert 0.98 * epsilon <= ours(GaussianSteps(multiplier, rate, steps), 1e-6) <= epsilon
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "spent_by",
    [
        lambda noise: 10 / noise,
        lambda noise: math.exp(-noise) + 1e-6,
        lambda noise: 1 / noise**6,
        lambda noise: math.inf if noise < 1.5 else 0.3 / noise,
        lambda noise: 60.0 if noise < 3.21 else 1e-5,
    ],
    ids=["a line", "bent", "steep", "nothing proven at first", "a cliff"],
)
def test_the_search_ends_at_the_least_noise_that_is_enough_whatever_the_curve(spent_by, monkeypatch):
    """An accountant in place of the real one: whatever falls with noise is searched right."""
    monkeypatch.setattr(accounting, "epsilon_spent", lambda spent, **_: spent_by(spent[0].noise_multiplier))
    multiplier = calibrate_noise(epsilon=0.5, delta=1e-5, sampling_rate=0.5, steps=3)
    assert spent_by(multiplier) <= 0.5
    assert spent_by(multiplier / 1.0011) > 0.5


def test_asking_again_costs_nothing():
    arguments = {"epsilon": 3.3, "delta": 1e-5, "sampling_rate": 0.2, "steps": 77}
    first = calibrate_noise(**arguments)
    began = time.process_time()
    assert calibrate_noise(**arguments) == first
    assert time.process_time() - began < 0.1


def test_no_noise_is_infinite_and_no_step_is_free():
    assert epsilon_spent((GaussianSteps(0.0, 0.5, 1),), delta=1e-5) == math.inf
    assert epsilon_spent((GaussianSteps(1.0, 0.5, 0),), delta=1e-5) == 0.0
    assert epsilon_spent((), delta=1e-5) == 0.0
    assert calibrate_noise(epsilon=math.inf, delta=1e-5, sampling_rate=1.0, steps=3) == 0.0


@pytest.mark.parametrize("steps", [10**7, 10**8, 10**9])
def test_millions_of_steps_are_bounded_at_once_or_not_at_all(steps):
    """The slack takes its share of delta; what is left is below what the tight accountant can tell apart."""
    began = time.process_time()
    assert epsilon_spent((GaussianSteps(10_000.0, 0.001, steps),), delta=1e-5) > SLACK_PER_STEP * steps
    assert time.process_time() - began < 5


def test_what_cannot_be_met_is_refused_with_what_would():
    with pytest.raises(PrivacyError, match="cannot be met") as caught:
        calibrate_noise(epsilon=1e-4, delta=1e-9, sampling_rate=1.0, steps=1_000_000)
    assert "epsilon >=" in caught.value.hint


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, 1e-13])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_spent((GaussianSteps(1.0, 1.0, 1),), delta=delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_an_impossible_epsilon_is_refused(epsilon):
    with pytest.raises(PrivacyError, match="epsilon"):
        calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=1.0, steps=1)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rule"),
    [
        (math.nan, 1.0, 1, "noise multiplier"),
        (-1.0, 1.0, 1, "noise multiplier"),
        (math.inf, 1.0, 1, "noise multiplier"),
        (1.0, 0.0, 1, "sampling rate"),
        (1.0, 1.5, 1, "sampling rate"),
        (1.0, math.nan, 1, "sampling rate"),
        (1.0, 1.0, -1, "steps"),
    ],
)
def test_what_is_no_mechanism_is_refused(noise, rate, steps, rule):
    with pytest.raises(PrivacyError, match=rule):
        GaussianSteps(noise, rate, steps)


@given(st.one_of(st.floats(0, 1e308), st.integers(0, 10**6).map(lambda n: math.nextafter(n / 1000, math.inf))))
def test_printed_epsilons_are_never_rounded_down_and_by_less_than_one_digit_up(epsilon):
    assert epsilon <= round_up(epsilon) <= epsilon * (1 + 1e-15) + 0.001 * (1 + 1e-9)
