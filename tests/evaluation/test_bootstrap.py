"""The bootstrap covers what it says, and pairing is what makes improvements visible."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedpt_secure.errors import DataError
from fedpt_secure.evaluation.bootstrap import (
    Estimate,
    bootstrap_rng,
    fraction_improved,
    gap_closed,
    improvement_interval,
    perplexity,
    ratio_interval,
)


def held_out_records(rng, records):
    """Records whose length and difficulty vary together, as in chat; the true loss per token is 4.2."""
    tokens = 1 + rng.poisson(rng.gamma(2, 10, records))
    difficulty = rng.normal(0, 0.8, records)
    return tokens, tokens * (4.2 + difficulty) + rng.normal(0, 1, records) * np.sqrt(tokens)


def coverage(interval, trials):
    return sum(interval(trial) for trial in range(trials)) / trials


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    """400 trials at level 0.9. The percentile bootstrap undercovers slightly at 150 records (about 0.89).

    A coverage of 0.88 or more fails below 0.835 with probability under 0.5 %, above 0.95 with less.
    """

    def covers(trial):
        rng = np.random.default_rng([7, trial])
        tokens, nll = held_out_records(rng, 150)
        estimate = ratio_interval(nll, tokens, rng, resamples=300, level=0.9)
        return estimate.low <= 4.2 <= estimate.high

    assert 0.835 <= coverage(covers, 400) <= 0.95


def test_resampling_tokens_instead_of_records_would_be_caught():
    """The broken variant: every token its own record, as if tokens were independent."""

    def covers(trial):
        rng = np.random.default_rng([7, trial])
        tokens, nll = held_out_records(rng, 150)
        per_token = np.repeat(nll / tokens, tokens)
        estimate = ratio_interval(per_token, np.ones(len(per_token)), rng, resamples=200, level=0.9)
        return estimate.low <= 4.2 <= estimate.high

    assert coverage(covers, 60) < 0.6


def test_an_unpaired_comparison_is_wider_and_misses_a_real_improvement():
    rng = np.random.default_rng(1)
    tokens, before = held_out_records(rng, 300)
    after = before - tokens * 0.05 + rng.normal(0, 0.2, 300) * np.sqrt(tokens)
    paired = improvement_interval(before, after, tokens, bootstrap_rng(0))
    one, other = (ratio_interval(arm, tokens, bootstrap_rng(seed)) for seed, arm in enumerate((before, after)))
    half_width = math.hypot(one.high - one.low, other.high - other.low) / 2
    assert paired.low > 0.03
    assert paired.high < 0.07
    assert half_width > 5 * (paired.high - paired.low) / 2
    assert paired.value - half_width < 0


def test_the_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(2)
    tokens, nll = held_out_records(rng, 200)
    theirs = stats.bootstrap(
        (nll, tokens),
        lambda x, n, axis: x.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    ours = ratio_interval(nll, tokens, bootstrap_rng(0), resamples=20_000)
    assert ours.value == pytest.approx(nll.sum() / tokens.sum())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_seed_fixes_the_interval_and_memory_chunks_do_not_matter(monkeypatch):
    tokens, nll = held_out_records(np.random.default_rng(2), 50)
    first = ratio_interval(nll, tokens, bootstrap_rng(4))
    assert first == ratio_interval(nll, tokens, bootstrap_rng(4))
    assert first != ratio_interval(nll, tokens, bootstrap_rng(5))
    monkeypatch.setattr("fedpt_secure.evaluation.bootstrap._DRAWS_AT_ONCE", 333)
    assert first == ratio_interval(nll, tokens, bootstrap_rng(4))


def test_perplexity_is_the_exponential_of_the_loss_and_of_its_interval():
    assert perplexity(Estimate(1.0, 0.5, 2.0)) == Estimate(math.e, math.exp(0.5), math.exp(2))


def test_a_perplexity_beyond_the_floats_is_infinite():
    assert perplexity(Estimate(710.0, 0.0, 1e6)) == Estimate(math.inf, 1.0, math.inf)
    assert math.isfinite(perplexity(Estimate(709.0, 709.0, 709.0)).value)


def test_a_tie_is_no_improvement():
    assert fraction_improved([1.0, 2.0, 3.0, 4.0], [0.5, 2.0, 3.5, 3.9]) == 0.5


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        ([1.0], [1]),
        ([], []),
        ([1.0, 2.0], [1]),
        ([1.0, math.nan], [1, 1]),
        ([1.0, math.inf], [1, 1]),
        ([1.0, 2.0], [1, 0]),
    ],
)
def test_figures_without_an_interval_are_refused(sums, counts):
    with pytest.raises(DataError, match="bootstrap needs"):
        ratio_interval(sums, counts, bootstrap_rng(0))


def test_arms_over_different_records_cannot_be_compared():
    with pytest.raises(DataError, match="same records"):
        improvement_interval([1.0, 2.0], [1.0, 2.0, 3.0], [1, 1], bootstrap_rng(0))


def test_the_share_of_the_gap_is_the_ratio_of_gains_and_its_interval_covers_the_truth():
    """95 % intervals over 200 data sets: coverage below 0.89 has chance 4e-4 at the nominal level."""
    generator, covered = np.random.default_rng(8), 0
    for trial in range(200):
        before = generator.normal(40, 8, 150)
        gap = generator.normal(5, 2, 150)
        after, ceiling = before - 0.4 * gap + generator.normal(0, 1, 150), before - gap
        found = gap_closed(before, after, ceiling, bootstrap_rng(trial), resamples=400)
        covered += found.low <= 0.4 <= found.high
    assert covered / 200 >= 0.89
    exact = gap_closed([4.0, 6.0], [3.0, 5.0], [2.0, 4.0], bootstrap_rng(0))
    assert exact.value == pytest.approx(0.5)


def test_no_share_is_stated_of_a_gap_that_may_not_be_there():
    generator = np.random.default_rng(9)
    before = generator.normal(40, 8, 50)
    noise = generator.normal(0, 1, 50)
    assert gap_closed(before, before - 1, before + noise - noise.mean(), bootstrap_rng(0)) is None
    assert gap_closed(before, before - 1, before + 1, bootstrap_rng(0)) is None


def test_arms_of_other_records_or_with_nan_are_refused():
    with pytest.raises(DataError, match="same two records"):
        gap_closed([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0], bootstrap_rng(0))
    with pytest.raises(DataError, match="finite"):
        gap_closed([1.0, 2.0], [1.0, math.nan], [0.0, 0.0], bootstrap_rng(0))
