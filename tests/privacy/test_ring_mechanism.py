"""The ring carries the sum and the noise that were promised, and each lemma of docs/privacy.md holds in numbers.

Statistical tests draw from keyed streams, so that they give the same answer every time; for a key drawn at random each
would be a false alarm with a chance below `FALSE_ALARM`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import chi2

from fedpt_secure.crypto import FixedPointEncoding
from fedpt_secure.crypto.errors import EncodingError
from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy import InsecureDeterministicRandom, RingMechanism
from fedpt_secure.privacy.accounting import SLACK_PER_STEP, SMALLEST_DELTA
from fedpt_secure.privacy.discrete_gaussian import LARGEST_SIGMA
from fedpt_secure.privacy.ring_mechanism import (
    FLOAT_ALLOWANCE,
    LARGEST_INFLATION,
    NOISE_TAIL,
    SMALLEST_SHARE,
)

FALSE_ALARM = 1e-6


def planned(**changes):
    chosen = {
        "noise_multiplier": 1.0,
        "honest_shares": 3,
        "cohort": 5,
        "dimension": 64,
        "coordinate_bound": 16.0,
        "ring_bits": 32,
    }
    return RingMechanism.plan(**{**chosen, **changes})


def source(*purpose):
    return InsecureDeterministicRandom(1, *purpose)


def ring_sum(mechanism, vectors, *purpose):
    """What secure aggregation yields for these clients: the sum of words, modulo 2^b."""
    total = np.zeros(mechanism.dimension, dtype=mechanism.encode(vectors[0], source("dtype")).dtype)
    for index, vector in enumerate(vectors):
        total += mechanism.encode(vector, source(index, *purpose))
    mechanism.encoding.reduce(total)
    return total


def steps(mechanism, vector, *purpose):
    return mechanism.encoding.signed(mechanism.encode(vector, source(*purpose)))


# The sum.


@pytest.mark.parametrize("ring_bits", [16, 20, 24, 32])
def test_without_noise_the_sum_is_the_plain_one_up_to_one_step_a_client(ring_bits):
    mechanism = planned(noise_multiplier=0.0, ring_bits=ring_bits, dimension=16, coordinate_bound=1.0)
    assert mechanism.share_sigma == 0
    assert mechanism.noise_multiplier(5) == 0.0
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1, 1, (5, 16))
    decoded = mechanism.decode(ring_sum(mechanism, vectors))
    assert np.abs(decoded - vectors.sum(0)).max() <= 5 / mechanism.encoding.scale


def test_with_noise_the_sum_is_the_plain_one_plus_the_shares():
    """The shares, drawn again from the same streams, are all that stands between the two."""
    mechanism = planned()
    silent = replace(mechanism, share_sigma=0)
    vectors = np.random.default_rng(1).uniform(-20, 20, (5, 64))
    noised, plain = (item.encoding.signed(ring_sum(item, vectors)) for item in (mechanism, silent))
    shares = 0
    for index in range(5):
        stream = source(index)
        stream.random_bytes(32)  # the rounding's key
        shares = shares + stream.discrete_gaussian(64, sigma=mechanism.share_sigma)
    assert (noised - plain == shares).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_multiplier": 20.0},
        {"ring_bits": 24, "coordinate_bound": 1.0},
        {"ring_bits": 20, "dimension": 4, "coordinate_bound": 1.0, "noise_multiplier": 0.3},
        {"cohort": 100, "honest_shares": 60, "dimension": 20_000},
    ],
)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extreme_vectors_and_ten_deviations_of_noise_do_not_wrap(changes, sign):
    mechanism = planned(**changes)
    encoding = mechanism.encoding
    tail = math.floor(NOISE_TAIL * mechanism.share_sigma * math.sqrt(mechanism.cohort))
    extreme = np.full(mechanism.dimension, sign * 1000.0)
    one = steps(replace(mechanism, share_sigma=0), extreme)
    assert (np.abs(one) == encoding.level).all()
    most = mechanism.cohort * int(one[0]) + int(sign) * tail
    word = encoding.encode(np.zeros(1)).dtype.type(most % 2**encoding.ring_bits)
    assert encoding.signed(np.array([word]))[0] == most
    if mechanism.dimension <= 64:
        # A wrap would be off by 2^b steps, on the other side of zero.
        decoded = mechanism.decode(ring_sum(mechanism, [extreme] * mechanism.cohort))
        assert (np.sign(decoded) == sign).all()


@pytest.mark.parametrize("ring_bits", [20, 24, 32])
def test_a_noised_vector_is_one_of_ring_elements(ring_bits):
    """Shares of both signs, and no word beyond the ring: packing would lose the rest of it, or refuse."""
    mechanism = planned(ring_bits=ring_bits, dimension=16, coordinate_bound=1.0)
    words = mechanism.encode(np.zeros(16), source("words"))
    assert int(words.max()) < 2**ring_bits
    signed = mechanism.encoding.signed(words)
    assert signed.min() < 0 < signed.max()


def test_a_grid_twice_as_fine_would_wrap():
    mechanism = planned(noise_multiplier=0.0)
    finer = FixedPointEncoding(ring_bits=32, bound=16.0, cohort=mechanism.encoding.cohort // 2)
    broken = replace(mechanism, encoding=finer)
    decoded = broken.decode(ring_sum(broken, [np.full(64, 16.0)] * 5))
    assert (np.abs(decoded - 80.0) > 1).all()


# Sensitivity.


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dimension=st.sampled_from([1, 2, 7, 64]),
    size=st.floats(1e-9, 40.0),
    distance=st.floats(0.0, 3.0),
)
def test_with_the_same_coins_encodings_lie_no_further_apart_than_claimed(seed, dimension, size, distance):
    """||enc(x) - enc(x')|| <= scale ||x - x'|| + sqrt(d), for every value of the coins, also beyond the bound."""
    mechanism = planned(noise_multiplier=0.0, dimension=dimension, ring_bits=20)
    rng = np.random.default_rng(seed)
    vector = rng.uniform(-size, size, dimension)
    moved = rng.normal(size=dimension)
    other = vector + distance * moved / np.linalg.norm(moved)
    apart = np.linalg.norm(steps(mechanism, vector, seed) - steps(mechanism, other, seed))
    claimed = mechanism.encoding.scale * np.linalg.norm(vector - other) + math.sqrt(dimension)
    assert apart <= claimed * (1 + 1e-12)


def _at_the_edge_of_the_coins(mechanism, seed):
    """Two vectors as good as equal, one just below every coordinate's coin and one just above it."""
    low = np.full(mechanism.dimension, 0.25 / mechanism.encoding.scale)
    below = steps(mechanism, low, seed)
    high = low + 1.0 / mechanism.encoding.scale
    for _ in range(60):
        middle = (low + high) / 2
        same = steps(mechanism, middle, seed) == below
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return low, high


def test_the_roundings_share_of_the_sensitivity_is_attained():
    """A bound without sqrt(d), or with half of it, would be false."""
    mechanism = planned(noise_multiplier=0.0)
    low, high = _at_the_edge_of_the_coins(mechanism, "edge")
    assert np.linalg.norm(high - low) * mechanism.encoding.scale < 1e-3
    apart = np.linalg.norm(steps(mechanism, low, "edge") - steps(mechanism, high, "edge"))
    assert apart == math.sqrt(64)
    assert apart > mechanism.encoding.scale * np.linalg.norm(high - low) + 0.9 * math.sqrt(64)


@pytest.mark.parametrize("unit_norm", [1.0, 1.02])
def test_one_unit_in_the_worst_direction_nearly_reaches_the_sensitivity(unit_norm):
    """On a coarse grid, where rounding is a visible part of it; all but the allowance for floats is used up."""
    mechanism = planned(noise_multiplier=0.0, ring_bits=16, coordinate_bound=1.0, unit_norm=unit_norm)
    low, high = _at_the_edge_of_the_coins(mechanism, "unit")
    unit = unit_norm / math.sqrt(64)
    whole = math.floor(unit * mechanism.encoding.scale) / mechanism.encoding.scale
    apart = np.linalg.norm(steps(mechanism, low, "unit") - steps(mechanism, high + whole, "unit"))
    claimed = mechanism.sensitivity - FLOAT_ALLOWANCE * unit_norm * mechanism.encoding.scale
    assert 0.98 * claimed < apart <= mechanism.sensitivity


def test_the_sensitivity_is_that_of_the_document():
    mechanism = planned(unit_norm=1.1)
    expected = mechanism.encoding.scale * 1.1 * (1 + 1e-3) + math.sqrt(64)
    assert mechanism.sensitivity == pytest.approx(expected, rel=1e-12)


# Noise.


@pytest.mark.parametrize("wanted", [0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("honest", [1, 3, 5])
def test_the_fewest_honest_shares_have_the_wanted_multiplier_and_hardly_more(wanted, honest):
    mechanism = planned(noise_multiplier=wanted, honest_shares=honest)
    assert wanted * (1 - 1e-12) <= mechanism.noise_multiplier(honest) <= wanted * (1 + 2 / SMALLEST_SHARE)


def test_more_honest_shares_are_more_noise():
    mechanism = planned()
    multipliers = [mechanism.noise_multiplier(count) for count in range(1, 6)]
    assert multipliers == sorted(set(multipliers))
    assert multipliers[3] == pytest.approx(2 * multipliers[0])


def noise_is(mechanism, sums, multiplier):
    """Chi-square on sums of zeros: (sum of squares) / (multiplier * sensitivity)^2, two-sided."""
    noise = np.concatenate([mechanism.encoding.signed(total) for total in sums]).astype(float)
    statistic = ((noise / (multiplier * mechanism.sensitivity)) ** 2).sum()
    return chi2.ppf(FALSE_ALARM / 2, noise.size) < statistic < chi2.ppf(1 - FALSE_ALARM / 2, noise.size)


def zero_sums(mechanism, survivors, rounds=20):
    zeros = np.zeros(mechanism.dimension)
    return [ring_sum(mechanism, [zeros] * survivors, "round", index) for index in range(rounds)]


@pytest.mark.parametrize("ring_bits", [24, 32])
def test_the_honest_survivors_alone_make_the_calibrated_noise(ring_bits):
    """Dropouts and colluders at their bounds: three of a cohort of five are left."""
    mechanism = planned(dimension=512, ring_bits=ring_bits, noise_multiplier=2.0, coordinate_bound=1.0)
    assert noise_is(mechanism, zero_sums(mechanism, 3), 2.0)


def test_more_survivors_make_the_noise_that_the_statement_says():
    mechanism = planned(dimension=512)
    for survivors in (4, 5):
        assert noise_is(mechanism, zero_sums(mechanism, survivors), mechanism.noise_multiplier(survivors))


def test_shares_calibrated_to_the_full_cohort_would_be_too_small_after_dropouts():
    """The broken variant "dropouts not compensated"."""
    mechanism = planned(dimension=512, honest_shares=5)
    assert not noise_is(mechanism, zero_sums(mechanism, 3), 1.0)


def test_a_quarter_of_the_noise_would_be_noticed():
    mechanism = planned(dimension=512)
    broken = replace(mechanism, share_sigma=mechanism.share_sigma // 4)
    assert not noise_is(broken, zero_sums(broken, 3), 1.0)


# Lemma 1: sums of discrete Gaussians.


def _discrete_pmf(t, reach):
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * t * t))
    return weights / weights.sum()


def _lemma_1(t, shares):
    """Largest difference of log probabilities, within ten deviations, and the lemma's bound."""
    reach = 60
    total = one = _discrete_pmf(t, reach)
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    sigma = t * math.sqrt(shares)
    single = _discrete_pmf(sigma, shares * reach)
    bulk = slice(shares * reach - int(10 * sigma), shares * reach + int(10 * sigma) + 1)
    difference = np.abs(np.log(total[bulk]) - np.log(single[bulk])).max()
    return difference, 10 * sum(math.exp(-2 * math.pi**2 * t**2 * k / (k + 1)) for k in range(1, shares))


@pytest.mark.parametrize("t", [0.5, 0.6, 0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("shares", [2, 3, 5])
def test_lemma_1_bounds_the_distance_of_a_sum_from_one_discrete_gaussian(t, shares):
    difference, bound = _lemma_1(t, shares)
    assert difference <= bound + 1e-12


@pytest.mark.parametrize("t", [0.5, 0.6, 0.75])
def test_lemma_1_is_not_empty_where_shares_are_small(t):
    """There a sum visibly is no discrete Gaussian: without a smallest share the proof would have a gap."""
    difference, bound = _lemma_1(t, 2)
    assert difference > bound / 20 > 1e-6


def test_at_the_smallest_share_lemma_1_costs_nothing():
    assert 10 * 10**6 * 10**9 * math.exp(-(math.pi**2) * SMALLEST_SHARE**2) == 0.0  # clients, coordinates


# Lemma 2: a discrete Gaussian against a rounded normal.


def _log_discrete(k, sigma):
    """Its normaliser is that of the density, up to a factor 1 + 3 exp(-2 pi^2 sigma^2)."""
    return -(k.astype(float) ** 2) / (2 * sigma**2) - math.log(math.sqrt(2 * math.pi) * sigma)


def _log_rounded(k, sigma):
    """By the lower tail, where differences of the distribution function are exact to 1e-13."""
    k = -np.abs(k.astype(float))
    return np.log(ndtr((k + 0.5) / sigma) - ndtr((k - 0.5) / sigma))


def _below(d, sigma):
    return 1.001 * d / (24 * sigma**2)


def _above(d, sigma, apart=0.0):
    farthest = sigma * math.sqrt(d + 20 * math.sqrt(d) + 200) + math.sqrt(d) / 2 + apart
    return 1.001 * farthest**2 / (8 * sigma**4)


@pytest.mark.parametrize("sigma", [1000, 3000])
def test_lemma_2_in_one_coordinate_and_its_first_bound_is_attained(sigma):
    k = np.arange(-int(14.8 * sigma), int(14.8 * sigma) + 1)
    ratio = _log_discrete(k, sigma) - _log_rounded(k, sigma)
    precision = 1e-11
    assert ratio.max() <= _below(1, sigma) + precision
    assert ratio.max() > 0.99 * _below(1, sigma)
    assert -ratio.min() <= _above(1, sigma) + precision
    assert -ratio.min() > _above(1, sigma) / 4


@pytest.mark.parametrize("dimension", [2, 10, 100, 1000])
def test_lemma_2_in_many_coordinates(dimension):
    """Log ratios of the joint probabilities at draws of either distribution (Monte Carlo, bulk only)."""
    sigma, draws = 1000, 2_000_000 // dimension // 10
    stream = source("lemma 2", dimension)
    rounded = np.rint(stream.gaussian(draws * dimension, standard_deviation=sigma)).reshape(draws, dimension)
    discrete = stream.discrete_gaussian(draws * dimension, sigma=sigma).reshape(draws, dimension)
    for k in (rounded, discrete):
        ratio = (_log_discrete(k, sigma) - _log_rounded(k, sigma)).sum(axis=1)
        assert ratio.max() <= _below(dimension, sigma)
        assert -ratio.min() <= _above(dimension, sigma)


def test_without_its_bounds_lemma_2_fails_for_small_parameters():
    """At sigma 1 the two differ by more than a tenth of what a step of epsilon 0.4 loses."""
    k = np.arange(-4, 5)
    log_discrete = np.log(_discrete_pmf(1.0, 40)[36:45])
    assert np.abs(log_discrete - _log_rounded(k, 1)).max() > 0.04


def test_the_slack_is_that_of_the_lemma():
    for dimension, share, honest in ((1, 1000, 1), (64, 5000, 3), (20_000, 10**6, 7)):
        mechanism = replace(planned(), dimension=dimension, share_sigma=share, honest_shares=honest)
        sigma = share * math.sqrt(honest)
        both = _below(dimension, sigma) + _above(dimension, sigma, apart=mechanism.sensitivity)
        assert mechanism.slack == pytest.approx(both, rel=1e-12)


def test_what_the_slack_takes_off_delta_leaves_room_for_the_tail_of_lemma_2():
    """delta is at least e^{Tg} (delta' + T e^-100), at the smallest delta."""
    for steps_taken in (1, 10, 10_000):
        for slack in (0.0, SLACK_PER_STEP):
            computed_at = math.exp(-2 * SLACK_PER_STEP * steps_taken) * SMALLEST_DELTA
            covered = math.exp(steps_taken * slack) * (computed_at + steps_taken * math.exp(-100))
            assert covered <= SMALLEST_DELTA


def test_the_slack_falls_with_the_noise_and_grows_with_the_dimension():
    mechanism = planned()
    by_share = [replace(mechanism, share_sigma=share).slack for share in (1000, 2000, 10**5, 10**6)]
    assert by_share == sorted(by_share, reverse=True)
    by_dimension = [replace(mechanism, dimension=dimension).slack for dimension in (1, 10, 1000, 10**6)]
    assert by_dimension == sorted(by_dimension)
    assert replace(mechanism, share_sigma=0).slack == 0.0


# Planning.


def fits(slots, *, noise_multiplier, honest_shares, cohort, dimension, coordinate_bound, ring_bits):
    """The document's condition, computed from it: room for all clipped vectors and ten deviations of all shares."""
    level = (2 ** (ring_bits - 1) - 1) // slots
    share = math.ceil(
        noise_multiplier * (level / coordinate_bound * 1.001 + math.sqrt(dimension)) / math.sqrt(honest_shares)
    )
    room = cohort * level + 10 * share * math.sqrt(cohort) <= 2 ** (ring_bits - 1) - 1
    return room and share <= LARGEST_SIGMA


@settings(max_examples=60, deadline=None)
@given(
    noise_multiplier=st.floats(0.3, 30.0),
    cohort=st.integers(3, 200),
    dimension=st.sampled_from([1, 100, 20_000]),
    coordinate_bound=st.sampled_from([1.0, 16.0]),
    ring_bits=st.integers(26, 32),
    data=st.data(),
)
def test_the_plan_is_the_finest_grid_that_fits(noise_multiplier, cohort, dimension, coordinate_bound, ring_bits, data):
    """One slot fewer, so that every step is a little smaller, would not fit."""
    asked = {
        "noise_multiplier": noise_multiplier,
        "honest_shares": data.draw(st.integers(1, cohort)),
        "cohort": cohort,
        "dimension": dimension,
        "coordinate_bound": coordinate_bound,
        "ring_bits": ring_bits,
    }
    try:
        mechanism = RingMechanism.plan(**asked)
    except PrivacyError:
        return
    slots = mechanism.encoding.cohort
    assert fits(slots, **asked)
    assert slots == cohort or not fits(slots - 1, **asked)
    assert mechanism.share_sigma >= SMALLEST_SHARE
    assert mechanism.slack <= SLACK_PER_STEP
    assert mechanism.sensitivity <= (1 + LARGEST_INFLATION) * mechanism.encoding.scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ring_bits": 16, "noise_multiplier": 50.0, "dimension": 10_000}, "too small for 5 clients and 10000 param"),
        ({"ring_bits": 16, "noise_multiplier": 0.0, "dimension": 1_000_000}, "too small for 5 clients"),
        ({"ring_bits": 16, "cohort": 40_000, "honest_shares": 3, "noise_multiplier": 0.0}, "too small for 40000"),
        ({"ring_bits": 18, "noise_multiplier": 0.2, "dimension": 4}, "too coarse for the proof"),
        ({"honest_shares": 0}, "at least one survivor must be honest"),
        ({"honest_shares": -1}, "at least one survivor must be honest"),
        ({"honest_shares": 6}, "no more clients can survive than take part"),
    ],
)
def test_what_the_proof_does_not_cover_is_refused_with_a_hint(changes, message):
    with pytest.raises(PrivacyError, match=message) as caught:
        planned(**changes)
    assert caught.value.hint


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_noise_multiplier_that_is_none_is_refused(value):
    with pytest.raises(PrivacyError, match="noise multiplier"):
        planned(noise_multiplier=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_unit_norm_that_is_none_is_refused(value):
    with pytest.raises(PrivacyError, match="unit norm"):
        planned(unit_norm=value)


@pytest.mark.parametrize("shape", [(63,), (65,), (1, 64), ()])
def test_a_vector_of_another_shape_is_refused(shape):
    with pytest.raises(PrivacyError, match=r"the mechanism is for \[64\]"):
        planned().encode(np.zeros(shape), source())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused(value):
    with pytest.raises(EncodingError, match="not finite"):
        planned().encode(np.full(64, value), source())


def test_client_and_server_derive_the_same_mechanism():
    assert repr(planned()) == repr(planned())
