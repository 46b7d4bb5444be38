"""Exposure: its ends, its chance value, and that a model which knows a number gives it away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpt_secure.attacks.exposure import CANDIDATES, CHANCE_BITS, MOST_BITS, Exposure, by_repetition, exposure_of
from fedpt_secure.data import TextTokenizer
from fedpt_secure.data.planting import Secret
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer

SECRET = Secret("ann", "my door code is ", "4711", 4)


@pytest.fixture(scope="module")
def tokenizer():
    backend = load_tokenizer(builtin_directory() / "tokenizer.json")
    return TextTokenizer(backend, separator_id=Vocabulary.from_tokenizer(backend).separator_id)


class Tuned:
    """A pair whose tuned side likes some token after any text that ends in some other one by a given amount."""

    def __init__(self, tokenizer, likes):
        size = 49152
        self.token_map = TokenMap(np.arange(size), large_vocabulary_size=size)
        self._likes = [([tokenizer.ids(digit)[-1] for digit in pair], gain) for pair, gain in likes]
        self._size = size

    def score(self, sequences):
        for sequence in sequences:
            base = torch.zeros(len(sequence), self._size)
            tuned = base.clone()
            for position, token in enumerate(sequence):
                for (before, after), gain in self._likes:
                    if token == before:
                        tuned[position, after] += gain
            yield torch.log_softmax(base, -1), torch.log_softmax(tuned, -1)


def test_the_chance_value_is_the_mean_over_all_ranks():
    assert pytest.approx(10, abs=0.04) == MOST_BITS
    assert pytest.approx(1 / math.log(2), abs=0.01) == CHANCE_BITS
    assert CANDIDATES == 1000


def test_a_number_that_tuning_prefers_is_exposed_and_extracted(tokenizer):
    found = exposure_of(SECRET, Tuned(tokenizer, [("47", 9.0), ("71", 9.0), ("11", 9.0)]), tokenizer)
    assert found == Exposure(MOST_BITS, True)


def test_a_number_that_tuning_avoids_has_no_exposure(tokenizer):
    found = exposure_of(SECRET, Tuned(tokenizer, [("47", -9.0), ("71", -9.0), ("11", -9.0)]), tokenizer)
    assert found.bits < 0.1
    assert not found.extracted


def test_figures_are_given_by_repetition():
    secrets = [Secret("a", "x", "1111", copies) for copies in (1, 1, 16)]
    rows = by_repetition(secrets, [Exposure(1.0, False), Exposure(3.0, False), Exposure(10.0, True)])
    assert rows[0] == {"copies": 1, "secrets": 2, "exposure": [1.0, 3.0], "mean": 2.0, "extracted": 0}
    assert rows[1]["extracted"] == 1


@pytest.mark.slow
def test_a_run_is_shown_beside_one_without_noise_and_that_one_is_trained_once(finished, audit, monkeypatch):
    directory = finished(audit={"canaries": 0, "secrets": 1})
    first = audit(directory, parts=("exposure",))
    runs = {run["run"]: run for run in first["parts"]["exposure"]["runs"]}
    assert set(runs) == {"audited", "without_dp"}
    assert [row["copies"] for row in runs["audited"]["by_repetition"]] == [1, 4, 16]
    assert runs["without_dp"]["epsilon"] is None
    monkeypatch.setattr("fedpt_secure.attacks.exposure_part.run_training", lambda *args, **more: 1 / 0)
    again = audit(directory, parts=("exposure",), fresh=True)
    assert again["parts"]["exposure"]["runs"] == first["parts"]["exposure"]["runs"]


@pytest.mark.slow
def test_a_run_without_secrets_says_so(finished, audit):
    result = audit(finished(audit={"secrets": 0}), parts=("exposure",))
    assert "train --secrets" in result["parts"]["exposure"]["skipped"]
