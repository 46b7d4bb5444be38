"""The discrete Gaussian is the exact one: no rounded normal, no nearly uniform draws underneath, no second zero.

Statistical tests draw from a keyed stream, so that they give the same answer every time; for a key drawn at random each
would be a false alarm with a chance below `FALSE_ALARM`.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.stats import binomtest, chi2, norm

from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy import InsecureDeterministicRandom, SecureRandom
from fedpt_secure.privacy import discrete_gaussian as module
from fedpt_secure.privacy.discrete_gaussian import LARGEST_SIGMA, discrete_gaussian

COUNT = 200_000
FALSE_ALARM = 1e-6
SMALL_SIGMAS = (1, 2, 7, 50)


def words_of(seed):
    return InsecureDeterministicRandom(seed, "discrete gaussian test")._words


def pmf(sigma):
    """Support and probabilities, up to 40 sigma."""
    support = np.arange(-40 * sigma, 40 * sigma + 1)
    weights = np.exp(-(support.astype(float) ** 2) / (2 * sigma**2))
    return support, weights / weights.sum()


def chi_square_accepts(observed, expected):
    """Pearson's test after pooling the cells that expect fewer than 10."""
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 10:
        observed[-2], expected[-2] = observed[-2:].sum(), expected[-2:].sum()
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return statistic < chi2.ppf(1 - FALSE_ALARM, len(expected) - 1)


def is_the_discrete_gaussian(sample, sigma):
    support, probabilities = pmf(sigma)
    inside = sample[np.abs(sample) <= 40 * sigma]
    observed = np.bincount(inside + 40 * sigma, minlength=len(support))
    return len(inside) == len(sample) and chi_square_accepts(observed, len(sample) * probabilities)


@pytest.mark.parametrize("sigma", SMALL_SIGMAS)
def test_frequencies_are_those_of_the_exact_distribution(sigma):
    assert is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=sigma, words=words_of(sigma)), sigma)


@pytest.mark.parametrize("sigma", [1 << 20, LARGEST_SIGMA])
def test_large_parameters_have_the_right_quantiles_and_unbiased_low_bits(sigma):
    """256 cells of equal probability; up there a normal's cells are a discrete Gaussian's to one part in 10^6."""
    sample = discrete_gaussian(COUNT, sigma=sigma, words=words_of(1))
    edges = sigma * norm.ppf(np.arange(1, 256) / 256)
    cells = np.bincount(np.searchsorted(edges, sample), minlength=256)
    assert chi_square_accepts(cells, np.full(256, COUNT / 256))
    for modulus in (2, 16, 3, 1000):
        assert chi_square_accepts(np.bincount(sample % modulus, minlength=modulus), np.full(modulus, COUNT / modulus))


@pytest.mark.parametrize("sigma", [*SMALL_SIGMAS, LARGEST_SIGMA])
def test_it_is_symmetric(sigma):
    sample = discrete_gaussian(COUNT, sigma=sigma, words=words_of(2))
    signed = sample[sample != 0]
    assert binomtest(int((signed > 0).sum()), len(signed)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("sigma", [*SMALL_SIGMAS, 1 << 16])
def test_the_variance_is_at_most_sigma_squared_and_hardly_less(sigma):
    if sigma <= 50:
        support, probabilities = pmf(sigma)
        exact = float((probabilities * support.astype(float) ** 2).sum())
        assert exact <= sigma**2 * (1 + 1e-12)
        assert exact >= sigma**2 * (1 - 1e-6)
    sample = discrete_gaussian(COUNT, sigma=sigma, words=words_of(3)).astype(float)
    # The squares' standard deviation is sqrt(2) sigma^2; 5 of the mean's have a chance of 6e-7.
    assert abs((sample**2).mean() / sigma**2 - 1) < 5 * math.sqrt(2 / COUNT)


def test_samples_do_not_depend_on_their_neighbours():
    """Lags 1 to 5 of the values and of their sizes; 5.6 standard deviations, false alarm 10 * 2e-8."""
    sample = discrete_gaussian(COUNT, sigma=1000, words=words_of(4)).astype(float)
    for values in (sample, np.abs(sample)):
        for lag in range(1, 6):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5.6 / math.sqrt(COUNT)


def test_it_is_a_function_of_its_words_and_of_nothing_else():
    first = discrete_gaussian(1000, sigma=1 << 20, words=words_of(5))
    np.random.seed(1)
    assert (discrete_gaussian(1000, sigma=1 << 20, words=words_of(5)) == first).all()
    other = discrete_gaussian(1000, sigma=1 << 20, words=words_of(6))
    assert np.isin(first, other).sum() < 20


def test_one_source_goes_on_and_two_secure_sources_share_nothing():
    source, another = SecureRandom(), SecureRandom()
    drawn = [source.discrete_gaussian(64, sigma=LARGEST_SIGMA) for _ in range(2)]
    drawn.append(another.discrete_gaussian(64, sigma=LARGEST_SIGMA))
    for left in range(3):
        for right in range(left):
            assert (drawn[left] != drawn[right]).sum() > 50


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_as_many_as_were_asked_for(count):
    sample = discrete_gaussian(count, sigma=3, words=words_of(7))
    assert sample.shape == (count,)
    assert sample.dtype == np.int64


@pytest.mark.parametrize("sigma", [0, -1, LARGEST_SIGMA + 1, 1.0, 2.5, math.nan, "3", None])
def test_a_parameter_that_cannot_be_sampled_exactly_is_refused(sigma):
    with pytest.raises(PrivacyError, match="is not an integer in"):
        discrete_gaussian(1, sigma=sigma, words=words_of(0))


def test_a_negative_count_is_refused():
    with pytest.raises(PrivacyError, match="cannot draw -1"):
        discrete_gaussian(-1, sigma=1, words=words_of(0))


def test_the_largest_parameter_leaves_room_in_every_integer():
    """Of 53 bits all zero, and 11 more words' worth, a magnitude stays below 2^31 and its numerator below 2^63."""
    widest = module._block_width(LARGEST_SIGMA)
    assert widest <= 1 << module._LOW_BITS
    largest = (64 * math.log(2) * LARGEST_SIGMA / widest + 1) * widest
    assert largest < 1 << 31
    assert (largest - LARGEST_SIGMA) ** 2 + 2 * LARGEST_SIGMA * widest < 1 << 63


# The building blocks.


@pytest.mark.parametrize("sigma", [1, 2, 7, 8, 9, 50, 1 << 20, LARGEST_SIGMA - 1, LARGEST_SIGMA])
def test_blocks_are_at_most_an_eighth_of_sigma_and_at_least_a_sixteenth(sigma):
    width = module._block_width(sigma)
    assert width == 1 if sigma < 16 else sigma / 16 < width <= sigma / 8


@pytest.mark.parametrize("sigma", [1, 7, 50, 1000])
def test_blocks_are_geometric(sigma):
    ratio = math.exp(-module._block_width(sigma) / sigma)
    prefixes = words_of(9)(COUNT) >> np.uint64(11)
    drawn = module._blocks(prefixes, module._block_width(sigma), sigma, words_of(10))
    expected = COUNT * (1 - ratio) * ratio ** np.arange(drawn.max() + 50)
    assert chi_square_accepts(np.bincount(drawn, minlength=len(expected)), expected)


@pytest.mark.parametrize(("numerator", "sigma"), [(0, 3), (1, 1), (2, 1), (9, 3), (7, 2), (31, 3), (1 << 40, 1 << 20)])
def test_coins_succeed_with_probability_exp_of_minus_the_fraction(numerator, sigma):
    prefixes = words_of(numerator)(COUNT) >> np.uint64(20)
    heads = module._coins(prefixes, np.full(COUNT, numerator), sigma, words_of(17)).sum()
    assert binomtest(int(heads), COUNT, math.exp(-numerator / (2 * sigma**2))).pvalue > FALSE_ALARM


def undecided_by_floats(monkeypatch):
    """Every comparison goes the exact way."""
    monkeypatch.setattr(module, "_K_MARGIN", 1.0)
    monkeypatch.setattr(module, "_COIN_MARGIN", 2.0**50)


@pytest.mark.parametrize("sigma", [*SMALL_SIGMAS, 1000, 12_345, LARGEST_SIGMA])
def test_what_floating_point_decides_is_what_exact_arithmetic_decides(monkeypatch, sigma):
    fast = discrete_gaussian(300, sigma=sigma, words=words_of(18))
    undecided_by_floats(monkeypatch)
    assert (discrete_gaussian(300, sigma=sigma, words=words_of(18)) == fast).all()


def exact_exp(numerator, denominator, bits):
    """floor(2^bits exp(-numerator / denominator)), by 120 digits."""
    with localcontext() as context:
        context.prec = 120
        return int((-Decimal(numerator) / Decimal(denominator)).exp() * (1 << bits))


def fixed(word):
    return lambda size: np.full(size, word, dtype=np.uint64)


LEAST, MOST = np.uint64(0), np.uint64(2**64 - 1)


def coins_next_to_their_thresholds():
    """For 200 numerators, the 44-bit number that the threshold cuts; the word that follows it decides."""
    sigma = 1 << 20
    numerators = np.linspace(1, 30 * sigma * sigma, 200).astype(np.int64)
    cut = np.array([exact_exp(int(n), 2 * sigma * sigma, 44) for n in numerators], dtype=np.uint64)
    for shift, following, expected in ((0, LEAST, True), (0, MOST, False), (-1, MOST, True), (1, LEAST, False)):
        usable = cut.astype(np.int64) + shift >= 0
        prefixes = (cut[usable].astype(np.int64) + shift).astype(np.uint64)
        yield (module._coins(prefixes, numerators[usable], sigma, fixed(following)) == expected).all()


def blocks_next_to_their_thresholds():
    """The same for the 53-bit numbers that the first 300 blocks begin at."""
    sigma = 1000
    width = module._block_width(sigma)
    cut = np.array([exact_exp(k * width, sigma, 53) for k in range(1, 300)], dtype=np.int64)
    for shift, following, more in ((0, LEAST, 1), (0, MOST, 0), (-1, MOST, 1), (1, LEAST, 0)):
        prefixes = (cut + shift).astype(np.uint64)
        found = module._blocks(prefixes, width, sigma, fixed(following))
        yield (found == np.arange(299) + more).all()


def test_numbers_next_to_a_threshold_are_decided_by_the_bits_that_follow():
    assert all(coins_next_to_their_thresholds())
    assert all(blocks_next_to_their_thresholds())


# Broken variants: the same test notices each.


def test_margins_that_leave_out_the_undrawn_bits_would_be_noticed(monkeypatch):
    monkeypatch.setattr(module, "_COIN_MARGIN", -0.5)
    monkeypatch.setattr(module, "_K_MARGIN", 0.0)
    assert not all(coins_next_to_their_thresholds())
    assert not all(blocks_next_to_their_thresholds())


@pytest.mark.parametrize("sigma", [1, 2])
def test_a_rounded_normal_would_be_noticed(sigma):
    normal = InsecureDeterministicRandom(11, "broken").gaussian(COUNT, standard_deviation=float(sigma))
    assert not is_the_discrete_gaussian(np.rint(normal).astype(np.int64), sigma)


def test_a_one_sided_sampler_would_be_noticed(monkeypatch):
    honest = module._propose
    monkeypatch.setattr(module, "_propose", lambda *arguments: np.abs(honest(*arguments)))
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=2, words=words_of(13)), 2)


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_a_second_zero_would_be_noticed(monkeypatch, sigma):
    """Both zeros kept: of the rejected attempts, those at magnitude 0 come back as often as they were accepted."""
    honest = module._propose

    def two_zeros(*arguments):
        samples = honest(*arguments)
        return np.concatenate([samples, np.zeros((samples == 0).sum(), dtype=np.int64)])

    monkeypatch.setattr(module, "_propose", two_zeros)
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=sigma, words=words_of(14)), sigma)


def test_acceptance_of_every_proposal_would_be_noticed(monkeypatch):
    """Proposals let through as they are: nearly a discrete Laplace of the same scale."""
    monkeypatch.setattr(module, "_coins", lambda prefixes, *_: np.ones(len(prefixes), dtype=np.bool_))
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=7, words=words_of(15)), 7)


def test_acceptance_that_forgets_the_place_in_the_block_would_be_noticed(monkeypatch):
    """The paper's acceptance, without what one rejection for both takes on: m falls in steps of a block's width."""
    honest, source, drawn = module._coins, words_of(19), {}

    def remembering(size):
        drawn["words"] = source(size)
        return drawn["words"]

    def forgetful(prefixes, numerators, sigma, words):
        second = drawn["words"][len(prefixes) :]
        low = (second & np.uint64(module._block_width(sigma) - 1)).astype(np.int64)
        return honest(prefixes, numerators - 2 * sigma * low, sigma, source)

    monkeypatch.setattr(module, "_coins", forgetful)
    assert not is_the_discrete_gaussian(discrete_gaussian(5 * COUNT, sigma=50, words=remembering), 50)
    monkeypatch.undo()
    assert is_the_discrete_gaussian(discrete_gaussian(5 * COUNT, sigma=50, words=source), 50)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [2, 50])
def test_opendps_sampler_has_the_same_distribution(sigma):
    """Two samples, one from OpenDP's, which takes no seed; homogeneity by chi-square, false alarm 1e-6."""
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    theirs = np.array(dp.m.make_gaussian(*space, scale=float(sigma))([0] * 50_000))
    ours = discrete_gaussian(50_000, sigma=sigma, words=words_of(16))
    assert is_the_discrete_gaussian(theirs, sigma)
    low = min(theirs.min(), ours.min())
    counts = np.array([np.bincount(sample - low, minlength=100 * sigma) for sample in (theirs, ours)])
    counts = counts[:, counts.sum(0) >= 20]
    expected = counts.sum(0) / 2
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - FALSE_ALARM, counts.shape[1])
