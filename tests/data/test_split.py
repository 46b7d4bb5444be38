"""Every record ends in one place; a client's split depends on nothing but this client and the seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedpt_secure.data.records import Record
from fedpt_secure.data.split import prepare, remove_duplicates, split_client
from fedpt_secure.errors import ConfigError, DataError

names = st.text("abcdefg", min_size=1, max_size=3)
records = st.builds(Record, st.text("xyz \n", max_size=3), st.sampled_from(["", "p", "q"]))
federations = st.dictionaries(names, st.lists(records, max_size=12), max_size=6)
fractions = st.floats(0.01, 0.99)


def distinct(count):
    return [Record(f"record {index}") for index in range(count)]


def prepared(clients, *, seed=0, minimum=2, fraction=0.2):
    return prepare(clients, seed=seed, minimum_records=minimum, held_out_fraction=fraction, records_read=0, unusable={})


@given(federations)
def test_duplicates_leave_one_of_each_and_touch_nothing_else(clients):
    kept, removed = remove_duplicates(clients)
    keys = [record.key for mine in kept.values() for record in mine]
    everything = [record.key for mine in clients.values() for record in mine]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(everything)
    assert removed == len(everything) - len(keys)
    assert set(kept) == set(clients)


def test_duplicates_are_found_across_clients_and_by_stripping_only():
    clients = {"b": [Record("hi"), Record("Hi"), Record("hi  there")], "a": [Record(" hi\n"), Record("hi there")]}
    kept, removed = remove_duplicates(clients)
    assert kept == {"a": [Record(" hi\n"), Record("hi there")], "b": [Record("Hi"), Record("hi  there")]}
    assert removed == 1


@settings(deadline=None)
@given(federations, st.integers(0, 2**64), fractions)
def test_every_record_of_an_eligible_client_is_in_exactly_one_part(clients, seed, fraction):
    kept, _ = remove_duplicates(clients)
    eligible = {name: mine for name, mine in kept.items() if len(mine) >= 2}
    if not eligible:
        with pytest.raises(DataError):
            prepared(clients, seed=seed, fraction=fraction)
        return
    split, preparation = prepared(clients, seed=seed, fraction=fraction)
    assert [client.client_id for client in split] == sorted(eligible)
    for client in split:
        assert client.train
        assert client.held_out
        assert Counter(client.train + client.held_out) == Counter(eligible[client.client_id])
    used = sum(len(client.train) + len(client.held_out) for client in split)
    total = sum(map(len, clients.values()))
    assert used + preparation.duplicates + preparation.records_below_minimum == total


@given(st.integers(2, 40), st.integers(0, 100), fractions)
def test_held_out_count_is_the_nearest_that_leaves_both_parts(count, seed, fraction):
    split = split_client("a", distinct(count), seed=seed, held_out_fraction=fraction)
    assert len(split.held_out) == min(max(1, round(fraction * count)), count - 1)


@given(st.permutations(distinct(9)))
def test_split_does_not_depend_on_the_order_of_records(shuffled):
    straight = split_client("a", distinct(9), seed=3, held_out_fraction=0.3)
    assert set(split_client("a", shuffled, seed=3, held_out_fraction=0.3).held_out) == set(straight.held_out)


def test_both_parts_keep_the_order_of_the_source():
    split = split_client("a", distinct(50), seed=1, held_out_fraction=0.4)
    for part in (split.train, split.held_out):
        assert sorted(part, key=distinct(50).index) == list(part)


@given(st.integers(0, 10**6))
def test_adding_a_client_changes_no_other(seed):
    clients = {"a": distinct(20), "c": [Record(f"other {index}") for index in range(9)]}
    before, _ = prepared(clients, seed=seed)
    after, _ = prepared(clients | {"b": [Record(f"new {index}") for index in range(5)]}, seed=seed)
    assert [client for client in after if client.client_id != "b"] == before


@given(st.integers(2, 60), st.integers(0, 10**6), fractions)
def test_one_record_more_changes_the_training_set_by_at_most_two(count, seed, fraction):
    smaller = split_client("a", distinct(count), seed=seed, held_out_fraction=fraction)
    larger = split_client("a", distinct(count + 1), seed=seed, held_out_fraction=fraction)
    assert len(set(smaller.train) ^ set(larger.train)) <= 2


def test_split_is_the_same_for_ever():
    """A fixed answer: a change of the split would break every resumed run, so it must be deliberate."""
    split = split_client("someone", distinct(10), seed=42, held_out_fraction=0.3)
    assert [record.text for record in split.held_out] == ["record 2", "record 5", "record 7"]


def test_seed_and_client_change_the_split():
    def held_out(name, seed):
        return split_client(name, distinct(60), seed=seed, held_out_fraction=0.5).held_out

    assert len({held_out("a", 0), held_out("a", 1), held_out("b", 0), held_out("b", 1)}) == 4


def test_each_record_is_held_out_as_often_as_the_fraction_says():
    """10 records x 2,000 seeds at 0.3, each count inside its 1 - 1e-6 binomial interval: false alarm below 1e-5."""
    counts = Counter()
    for seed in range(2000):
        counts.update(split_client("a", distinct(10), seed=seed, held_out_fraction=0.3).held_out)
    low, high = binom.interval(1 - 1e-6, 2000, 0.3)
    assert all(low <= counts[record] <= high for record in distinct(10))


def test_clients_below_the_minimum_are_left_out_and_counted():
    split, preparation = prepared({"a": distinct(8), "b": [Record("x"), Record("y"), Record("x ")]}, minimum=3)
    assert [client.client_id for client in split] == ["a"]
    assert preparation.duplicates == 1
    assert preparation.clients_below_minimum == 1
    assert preparation.records_below_minimum == 2


def test_no_eligible_client_is_refused_with_the_minimum_that_would_do():
    with pytest.raises(DataError, match="the largest has 5") as caught:
        prepared({"a": distinct(5)}, minimum=8)
    assert "5 or less" in caught.value.hint
    with pytest.raises(DataError, match="none of the 1 clients"):
        prepared({"a": [Record("x"), Record("x")]})


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        split_client("a", distinct(5), seed=0, held_out_fraction=fraction)


def test_too_few_records_to_split_are_refused():
    with pytest.raises(DataError, match="needs at least 2"):
        split_client("a", distinct(1), seed=0, held_out_fraction=0.2)
    with pytest.raises(ConfigError, match="minimum_records 1"):
        prepared({"a": distinct(3)}, minimum=1)
