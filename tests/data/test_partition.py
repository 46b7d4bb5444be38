"""Every record is dealt once; equal is equal, Dirichlet is as uneven as alpha says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from fedpt_secure.data.partition import client_names, partition_equal, partition_labels, partition_sizes
from fedpt_secure.errors import ConfigError, DataError

seeds = st.integers(0, 2**64)
alphas = st.floats(5e-324, 1e6)


def sizes(owners, clients):
    return [owners.count(client) for client in range(clients)]


@given(st.integers(1, 80), st.integers(1, 12), seeds)
def test_equal_sizes_differ_by_at_most_one(records, clients, seed):
    if clients > records:
        with pytest.raises(DataError, match="cannot be dealt"):
            partition_equal(records, clients, seed=seed)
        return
    owners = partition_equal(records, clients, seed=seed)
    assert len(owners) == records
    assert max(sizes(owners, clients)) - min(sizes(owners, clients)) <= 1


@settings(deadline=None)
@given(st.integers(12, 80), st.integers(1, 12), alphas, seeds)
def test_dirichlet_sizes_deal_every_record_to_an_existing_client(records, clients, alpha, seed):
    owners = partition_sizes(records, clients, alpha=alpha, seed=seed)
    assert len(owners) == records
    assert set(owners) <= set(range(clients))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=12, max_size=80), st.integers(1, 12), alphas, seeds)
def test_dirichlet_mixtures_deal_every_record_and_keep_sizes_equal(labels, clients, alpha, seed):
    owners = partition_labels(labels, clients, alpha=alpha, seed=seed)
    assert len(owners) == len(labels)
    assert max(sizes(owners, clients)) - min(sizes(owners, clients)) <= 1


@pytest.mark.parametrize(
    "deal",
    [
        lambda seed: partition_equal(200, 7, seed=seed),
        lambda seed: partition_sizes(200, 7, alpha=0.5, seed=seed),
        lambda seed: partition_labels(["x", "y"] * 100, 7, alpha=0.5, seed=seed),
    ],
)
def test_partition_depends_on_the_seed_only(deal):
    assert deal(5) == deal(5)
    assert deal(5) != deal(6)


def mixture_distances(alpha):
    """Mean total-variation distance of the clients' label mixtures from the whole's, over 20 seeds."""
    labels = [str(index % 10) for index in range(2000)]
    distances = []
    for seed in range(20):
        owners = partition_labels(labels, 10, alpha=alpha, seed=seed)
        table = np.zeros((10, 10))
        for owner, label in zip(owners, labels, strict=True):
            table[owner, int(label)] += 1
        distances.append(0.5 * np.abs(table / table.sum(axis=1, keepdims=True) - 0.1).sum(axis=1).mean())
    return float(np.mean(distances))


def test_smaller_alpha_gives_more_different_mixtures():
    """Fixed seeds, so no false alarms; what was seen is 0.72, 0.59, 0.32, 0.08."""
    distances = [mixture_distances(alpha) for alpha in (0.001, 1.0, 10.0, 1000.0)]
    for seen, (low, high) in zip(distances, [(0.65, 0.9), (0.5, 0.65), (0.25, 0.4), (0.0, 0.12)], strict=True):
        assert low < seen < high


def test_first_draw_follows_the_labels_frequencies():
    """With one record a client, client 0's is a draw from p: 500 seeds inside a 1 - 1e-6 interval."""
    labels = ["a"] * 70 + ["b"] * 30
    hits = sum(labels[partition_labels(labels, 100, alpha=0.5, seed=seed).index(0)] == "a" for seed in range(500))
    low, high = binom.interval(1 - 1e-6, 500, 0.7)
    assert low <= hits <= high


def test_equal_partition_gives_each_record_to_each_client_equally_often():
    """Chi-square over 5 clients and 2,000 seeds for one record; false alarm 1e-6."""
    counts = Counter(partition_equal(10, 5, seed=seed)[3] for seed in range(2000))
    statistic = sum((counts[client] - 400) ** 2 / 400 for client in range(5))
    assert statistic < chi2.isf(1e-6, 4)


def test_sizes_spread_as_dirichlet_variance_says():
    """Var of a share is (1/k)(1-1/k)/(k alpha+1). Fixed seeds, so no false alarms; what was seen is 1.07 of it."""
    shares = np.array([partition_sizes(1000, 4, alpha=2.0, seed=seed).count(0) / 1000 for seed in range(200)])
    expected = 0.25 * 0.75 / (4 * 2.0 + 1)
    assert abs(shares.mean() - 0.25) < 5 * np.sqrt(expected / 200)
    assert 0.5 < shares.var() / expected < 1.6


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_is_no_concentration_is_refused(alpha):
    for call in (
        lambda: partition_sizes(10, 2, alpha=alpha, seed=0),
        lambda: partition_labels(["a"] * 10, 2, alpha=alpha, seed=0),
    ):
        with pytest.raises(ConfigError, match="dirichlet_alpha"):
            call()


def test_names_sort_as_numbers():
    assert client_names(11)[:2] == ["client-00", "client-01"]
    assert sorted(client_names(120)) == client_names(120)
    assert client_names(1) == ["client-0"]
    with pytest.raises(ConfigError, match="at least 1"):
        partition_equal(5, 0, seed=0)
