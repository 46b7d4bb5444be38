"""The discrete Gaussian is the exact one: no rounded normal, no nearly uniform draws underneath, no second zero.

Statistical tests draw from a keyed stream, so that they give the same answer every time; for a key drawn at random each
would be a false alarm with a chance below `FALSE_ALARM`.
"""

from __future__ import annotations

import math

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
    """Scale times 512 is 2^31, its square 2^62; a denominator of 2 sigma^2 may be multiplied 2^16 times."""
    assert LARGEST_SIGMA * 512 <= 1 << 31
    assert (2 * LARGEST_SIGMA**2) << 16 < 1 << 62


# The building blocks.


def scripted(*values):
    """Words in the given order; running out of them is an error."""
    rest = list(values)

    def words(size):
        taken, rest[:size] = rest[:size], []
        assert len(taken) == size, "more words were drawn than the draw needs"
        return np.array(taken, dtype=np.uint64)

    return words


@pytest.mark.parametrize("bound", [2, 3, 7, 10, 256, 1000, 3 << 20, (1 << 45) + 1, (1 << 61) + 12345])
def test_uniform_draws_keep_equally_many_words_for_each_value(bound):
    """The words kept are those below a multiple of the bound: the first and last of them, and the first refused."""
    kept = 2**64 - 2**64 % bound
    low, high = module._uniform_below(bound, 2, scripted(0, kept - 1))
    assert (low, high) == (0, bound - 1)
    if kept < 2**64:
        drawn = module._uniform_below(bound, 3, scripted(5, kept, 1, 2**64 - 1, bound + 1))
        assert drawn.tolist() == [5 % bound, 1, 1]
        again = module._uniform_below(bound, 1, scripted(2**64 - 1, kept, 1))
        assert again.tolist() == [1]


def test_a_bound_of_one_needs_no_word():
    assert module._uniform_below(1, 3, scripted()).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bound", [0, -1, 1 << 62])
def test_bounds_out_of_range_are_refused(bound):
    with pytest.raises(PrivacyError, match="uniform draw"):
        module._uniform_below(bound, 1, scripted(1))


@pytest.mark.parametrize("bound", [3, 10, 97])
def test_uniform_draws_are_uniform(bound):
    drawn = module._uniform_below(bound, COUNT, words_of(bound))
    assert chi_square_accepts(np.bincount(drawn, minlength=bound), np.full(bound, COUNT / bound))


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(0, 5), (1, 1), (1, 2), (2, 3), (5, 5), (7, 2), (31, 10), (4, 1)]
)
def test_coins_succeed_with_probability_exp_of_minus_the_fraction(numerator, denominator):
    heads = module._bernoulli_exp(np.full(COUNT, numerator), denominator, words_of(numerator)).sum()
    assert binomtest(int(heads), COUNT, math.exp(-numerator / denominator)).pvalue > FALSE_ALARM


def test_coins_of_different_fractions_in_one_array_keep_their_own_probability():
    numerators = np.tile(np.array([0, 1, 3, 8, 20]), COUNT // 5)
    heads = module._bernoulli_exp(numerators, 8, words_of(8))
    for numerator in (0, 1, 3, 8, 20):
        own = heads[numerators == numerator]
        assert binomtest(int(own.sum()), len(own), math.exp(-numerator / 8)).pvalue > FALSE_ALARM


def test_the_geometric_counts_successes_of_probability_one_over_e():
    drawn = module._geometric(COUNT, words_of(9))
    most = 40
    expected = COUNT * (1 - math.exp(-1)) * np.exp(-np.arange(most))
    assert drawn.max() < most
    assert chi_square_accepts(np.bincount(drawn, minlength=most), expected)


@pytest.mark.parametrize("scale", [1, 2, 7])
def test_proposals_are_discrete_laplace(scale):
    drawn = module._discrete_laplace(COUNT, scale, words_of(10))
    support = np.arange(-60 * scale, 60 * scale + 1)
    weights = np.exp(-np.abs(support) / scale)
    observed = np.bincount(drawn + 60 * scale, minlength=len(support))
    assert chi_square_accepts(observed, len(drawn) * weights / weights.sum())


# Broken variants: the same test notices each.


@pytest.mark.parametrize("sigma", [1, 2])
def test_a_rounded_normal_would_be_noticed(sigma):
    normal = InsecureDeterministicRandom(11, "broken").gaussian(COUNT, standard_deviation=float(sigma))
    assert not is_the_discrete_gaussian(np.rint(normal).astype(np.int64), sigma)


def test_draws_modulo_the_bound_without_rejection_would_be_noticed(monkeypatch):
    """With bytes for words, where the bias is large; with 64-bit words no test of any length would see it."""

    def biased(bound, size, words):
        return ((words(size) & np.uint64(255)) % np.uint64(bound)).astype(np.int64)

    monkeypatch.setattr(module, "_uniform_below", biased)
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=7, words=words_of(12)), 7)


def test_a_one_sided_proposal_would_be_noticed(monkeypatch):
    honest = module._discrete_laplace
    monkeypatch.setattr(module, "_discrete_laplace", lambda *arguments: np.abs(honest(*arguments)))
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=2, words=words_of(13)), 2)


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_a_second_zero_would_be_noticed(monkeypatch, sigma):
    def two_zeros(size, scale, words):
        low = module._uniform_below(scale, size, words)
        low = low[module._bernoulli_exp_fraction(low, scale, words)]
        magnitude = low + scale * module._geometric(low.size, words)
        return np.where(module._uniform_below(2, low.size, words) == 1, -magnitude, magnitude)

    monkeypatch.setattr(module, "_discrete_laplace", two_zeros)
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=sigma, words=words_of(14)), sigma)


def test_acceptance_without_the_square_would_be_noticed(monkeypatch):
    """Proposals let through as they are: a discrete Laplace of the same scale."""
    monkeypatch.setattr(module, "_propose", module._discrete_laplace)
    assert not is_the_discrete_gaussian(discrete_gaussian(COUNT, sigma=7, words=words_of(15)), 7)


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
