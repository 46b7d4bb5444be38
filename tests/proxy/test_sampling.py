"""What the settings make of a distribution, and that draws follow it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpt_secure.errors import ConfigError
from fedpt_secure.proxy.sampling import DecodingSettings, choose_token, draw, shaped
from fedpt_secure.proxy.steering import SteeringRule

ALONE = SteeringRule(alpha=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"repetition_penalty": 0.9},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": 11.0},
        {"stop": ("a", "")},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        DecodingSettings(**({"rule": ALONE, "max_new_tokens": 5} | change))


CASES = {
    (1.0, 1.0, 0): [0, 1, 2, 3, 4],
    (0.5, 1.0, 0): [0, 1, 2, 3, 4],
    (1.0, 0.6, 0): [1, 3],
    (1.0, 1.0, 3): [1, 3, 4],
    (1.0, 0.7, 3): [1, 3],
    (2.0, 0.7, 4): [1, 3, 4],
}


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), CASES)
def test_sampling_follows_the_tempered_truncated_distribution(temperature, top_p, top_k):
    """Chi-square over 20,000 seeded draws; a correct sampler fails a given seed with probability 1e-4."""
    logprobs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
    weights = logprobs.double().div(temperature).exp().numpy()
    kept = CASES[temperature, top_p, top_k]
    wanted = DecodingSettings(rule=ALONE, max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    rng = np.random.default_rng(5)
    counts = np.bincount([choose_token(logprobs, wanted, rng) for _ in range(20_000)], minlength=5)
    assert set(np.flatnonzero(counts)) == set(kept)
    expected = weights[kept] / weights[kept].sum() * 20_000
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-4


def test_an_excluded_token_is_never_chosen_and_the_lowest_id_wins_a_tie():
    wanted = DecodingSettings(rule=ALONE, max_new_tokens=1, temperature=100.0)
    logprobs = torch.tensor([-math.inf, 0.0, -math.inf])
    rng = np.random.default_rng(0)
    assert {choose_token(logprobs, wanted, rng) for _ in range(100)} == {1}
    greedy = dataclasses.replace(wanted, temperature=0.0)
    assert choose_token(torch.tensor([-3.0, -1.0, -1.0, -1.0]), greedy, rng) == 1
    two = dataclasses.replace(wanted, top_k=2)
    assert list(shaped(torch.tensor([-3.0, -1.0, -1.0, -1.0]), two, []).ids) == [1, 2]


def test_the_penalty_falls_once_on_every_token_that_was_seen_and_on_no_other():
    wanted = DecodingSettings(rule=ALONE, max_new_tokens=1, temperature=1.0, repetition_penalty=2.0)
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log()
    weights = np.array([0.25, 0.25, 0.25**2])
    np.testing.assert_allclose(shaped(logprobs, wanted, [2, 0, 2]).probabilities, weights / weights.sum())
    greedy = dataclasses.replace(wanted, temperature=0.0)
    assert list(shaped(logprobs, greedy, [0]).ids) == [0]
    assert list(shaped(logprobs, dataclasses.replace(greedy, repetition_penalty=3.0), [0]).ids) == [1]
    assert torch.equal(logprobs, torch.tensor([0.5, 0.25, 0.25]).log())


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([3, 1023, 1025, 5000]),
    flatness=st.sampled_from([0.0, 0.1, 3.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 1024, 2000]),
)
def test_truncation_without_a_full_sort_keeps_what_a_full_sort_keeps(seed, size, flatness, top_p, top_k):
    """Ties included: at flatness 0 all are equal, and values are rounded."""
    values = np.round(np.random.default_rng(seed).normal(0, flatness, size), 2)
    logprobs = torch.log_softmax(torch.from_numpy(values), dim=-1)
    wanted = DecodingSettings(rule=ALONE, max_new_tokens=1, temperature=1.0, top_p=top_p, top_k=top_k)
    got = shaped(logprobs, wanted, [])
    ranked = sorted(range(size), key=lambda i: (-float(logprobs[i]), i))[: top_k or size]
    weights = logprobs.exp().numpy()[ranked]
    mass = np.cumsum(weights) / weights.sum()
    kept = ranked if top_p == 1 else ranked[: int(np.searchsorted(mass, top_p - 1e-12)) + 1]
    # Where the mass hits top_p to the last digit, either side of the last token is right.
    assert set(got.ids) in (set(kept), set(ranked[: len(kept) + 1]), set(ranked[: len(kept) - 1]))
    assert abs(len(got.ids) - len(kept)) <= (1 if np.abs(mass - top_p).min() < 1e-9 else 0)
    assert got.probabilities.sum() == pytest.approx(1)


def test_a_certain_token_takes_no_random_number():
    wanted = DecodingSettings(rule=ALONE, max_new_tokens=1, temperature=1.0, top_k=1)
    assert draw(shaped(torch.tensor([-2.0, -0.1]), wanted, []), None) == 1
