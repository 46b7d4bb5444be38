"""The noise is Gaussian, of the right scale, and unpredictable."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from fedpt_secure.privacy import InsecureDeterministicRandom, SecureRandom

COUNT = 100_000
FALSE_ALARM = 1e-6  # of each statistical test below, per run: the generator is not seeded


def test_variance_lies_in_its_chi_square_interval():
    drawn = SecureRandom().gaussian(COUNT, standard_deviation=3.0)
    statistic = (drawn**2).sum() / 9.0
    assert chi2.ppf(FALSE_ALARM / 2, COUNT) < statistic < chi2.ppf(1 - FALSE_ALARM / 2, COUNT)


def test_a_quarter_of_the_scale_would_be_noticed():
    drawn = SecureRandom().gaussian(COUNT, standard_deviation=0.75)
    assert not chi2.ppf(FALSE_ALARM / 2, COUNT) < (drawn**2).sum() / 9.0 < chi2.ppf(1 - FALSE_ALARM / 2, COUNT)


def test_distribution_is_normal():
    assert kstest(SecureRandom().gaussian(COUNT, standard_deviation=1.0), "norm").pvalue > FALSE_ALARM


def test_neighbouring_draws_are_uncorrelated():
    drawn = SecureRandom().gaussian(COUNT, standard_deviation=1.0)
    correlation = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(correlation) < 5.2 / COUNT**0.5  # 5.2 standard deviations: 2e-7


def test_coins_have_the_stated_probability():
    heads = SecureRandom().bernoulli(COUNT, probability=0.3).sum()
    assert abs(heads - 0.3 * COUNT) < 5.2 * (COUNT * 0.21) ** 0.5


def test_certain_coins_are_certain():
    assert SecureRandom().bernoulli(10_000, probability=1.0).all()


def test_two_sources_never_share_a_stream():
    first = SecureRandom().gaussian(16, standard_deviation=1.0)
    second = SecureRandom().gaussian(16, standard_deviation=1.0)
    assert not np.isin(first, second).any()


def test_one_source_never_repeats_itself():
    source = SecureRandom()
    drawn = np.concatenate([source.gaussian(1000, standard_deviation=1.0) for _ in range(3)])
    assert len(np.unique(drawn)) == 3000


def test_a_global_seed_changes_nothing():
    np.random.seed(7)
    first = SecureRandom().gaussian(8, standard_deviation=1.0)
    np.random.seed(7)
    assert (first != SecureRandom().gaussian(8, standard_deviation=1.0)).any()


def test_deterministic_noise_repeats_and_says_that_it_is_not_private():
    first, second = InsecureDeterministicRandom(3, "a", 1), InsecureDeterministicRandom(3, "a", 1)
    other = InsecureDeterministicRandom(3, "a", 2)
    drawn = first.gaussian(8, standard_deviation=1.0)
    assert (drawn == second.gaussian(8, standard_deviation=1.0)).all()
    assert (drawn != other.gaussian(8, standard_deviation=1.0)).any()
    assert SecureRandom.is_private
    assert not InsecureDeterministicRandom.is_private


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_count_is_served(count):
    assert SecureRandom().gaussian(count, standard_deviation=1.0).shape == (count,)
