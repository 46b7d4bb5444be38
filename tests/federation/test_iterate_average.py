"""The average is the one of the formula, and a convex combination of the iterates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.federation.iterate_average import IterateAverage

ITERATES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def average_of(iterates, decay) -> np.ndarray:
    average = IterateAverage.fresh(decay, dimension=iterates.shape[1])
    for weights in iterates:
        average = average.with_iterate(weights)
    return average.value(iterates[-1])


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_the_formula(decay):
    weights = decay ** np.arange(len(ITERATES))[::-1]
    expected = (weights[:, None] * ITERATES).sum(0) / weights.sum()
    assert np.allclose(average_of(ITERATES, decay), expected, rtol=1e-5)


def test_without_decay_it_is_the_last_iterate_to_the_last_bit():
    assert np.array_equal(average_of(ITERATES, 0.0), ITERATES[-1])


def test_before_any_step_it_is_what_there_is():
    assert np.array_equal(IterateAverage.fresh(0.9, dimension=5).value(ITERATES[0]), ITERATES[0])


@given(decay=st.floats(0, 0.9999), steps=st.integers(1, 30), value=st.floats(-1e4, 1e4, width=32))
def test_an_average_of_equal_iterates_is_that_iterate(decay, steps, value):
    """Without the correction for its start it would shrink towards zero: the broken variant."""
    iterates = np.full((steps, 1), value, dtype=np.float32)
    assert average_of(iterates, decay) == pytest.approx(value, rel=1e-5, abs=1e-30)


def test_it_is_less_noisy_than_the_last_iterate():
    """Iterates of pure noise: variance falls to (1 - decay) / (1 + decay), here 1/19. Over 2,000 coordinates its
    relative deviation is 0.03: the bound is at more than six of them, a false alarm has a chance below 1e-9."""
    noise = np.random.default_rng(1).normal(size=(100, 2_000)).astype(np.float32)
    assert average_of(noise, 0.9).var() == pytest.approx(1 / 19, rel=0.2)
    assert noise[-1].var() > 0.9
