"""The server's step is the one of the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.federation.server_optimizer import (
    ADAM_EPSILON,
    ADAM_SECOND_MOMENT_DECAY,
    ServerOptimizer,
    pace_of,
)

RNG = np.random.default_rng(0)
UPDATES = RNG.normal(size=(6, 5))


def run(kind, learning_rate, momentum=0.9):
    weights = np.zeros(5, dtype=np.float32)
    optimizer = ServerOptimizer.fresh(kind, learning_rate=learning_rate, momentum=momentum, dimension=5)
    for update in UPDATES:
        weights, optimizer = optimizer.apply(weights, update)
    return weights


def reference(optimizer_class, **arguments):
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = optimizer_class([parameter], **arguments)
    for update in UPDATES:
        parameter.grad = -torch.tensor(update)
        optimizer.step()
    return parameter.detach().numpy()


def test_average_adds_the_mean_updates():
    assert np.allclose(run("average", 1.0), UPDATES.sum(0), atol=1e-6)


def test_momentum_is_sgd_with_momentum_on_the_updates():
    assert np.allclose(run("momentum", 0.1), reference(torch.optim.SGD, lr=0.1, momentum=0.9), atol=1e-6)


def test_adam_is_adam_on_the_updates():
    expected = reference(torch.optim.Adam, lr=0.1, betas=(0.9, ADAM_SECOND_MOMENT_DECAY), eps=ADAM_EPSILON)
    assert np.allclose(run("adam", 0.1), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_adam_does_not_depend_on_the_scale_of_updates(factor):
    optimizer = ServerOptimizer.fresh("adam", learning_rate=0.1, momentum=0.9, dimension=5)
    weights, _ = optimizer.apply(np.zeros(5, dtype=np.float32), UPDATES[0])
    scaled, _ = optimizer.apply(np.zeros(5, dtype=np.float32), UPDATES[0] * factor)
    assert np.allclose(weights, scaled, rtol=1e-5)


@pytest.mark.parametrize("kind", ["average", "momentum", "adam"])
def test_an_entry_that_is_trained_in_some_rounds_moves_as_if_there_were_no_others(kind):
    """Its weights, its moments and their correction: all as of an optimizer that saw its rounds alone."""
    optimizer = ServerOptimizer.fresh(kind, learning_rate=0.1, momentum=0.9, dimension=5)
    weights = np.zeros(5, dtype=np.float32)
    masks = [np.arange(5) % 2 == index % 2 for index in range(6)]
    for update, mask in zip(UPDATES, masks, strict=True):
        before = weights
        weights, optimizer = optimizer.apply(weights, np.where(mask, update, 0.0), trained=mask)
        assert (weights[~mask] == before[~mask]).all()
    for parity in (0, 1):
        alone = ServerOptimizer.fresh(kind, learning_rate=0.1, momentum=0.9, dimension=5)
        expected = np.zeros(5, dtype=np.float32)
        for update in UPDATES[parity::2]:
            expected, alone = alone.apply(expected, update)
        assert np.array_equal(weights[parity::2], expected[parity::2])


def test_without_the_mask_an_old_direction_goes_on_moving_what_is_not_trained():
    """The broken variant."""
    optimizer = ServerOptimizer.fresh("adam", learning_rate=0.1, momentum=0.9, dimension=5)
    weights, optimizer = optimizer.apply(np.zeros(5, dtype=np.float32), UPDATES[0])
    moved, _ = optimizer.apply(weights, np.zeros(5))
    assert (moved != weights).all()


def test_the_rate_rises_stays_and_falls():
    paces = [pace_of(index, rounds=10, warm_up=4, cool_down=0.3) for index in range(10)]
    assert paces == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_without_a_pace_every_round_has_the_whole_rate():
    assert {pace_of(index, rounds=5, warm_up=0, cool_down=0.0) for index in range(5)} == {1.0}


@given(st.integers(1, 200), st.integers(0, 300), st.floats(0, 1))
def test_no_round_stands_still_or_goes_faster_than_the_rate(rounds, warm_up, cool_down):
    paces = [pace_of(index, rounds=rounds, warm_up=warm_up, cool_down=cool_down) for index in range(rounds)]
    assert all(0 < pace <= 1 for pace in paces)


@pytest.mark.parametrize("kind", ["average", "momentum", "adam"])
def test_half_the_pace_moves_half_as_far_and_leaves_the_same_moments(kind):
    optimizer = ServerOptimizer.fresh(kind, learning_rate=0.5, momentum=0.9, dimension=5)
    start = np.zeros(5, dtype=np.float32)
    (whole, after), (half, after_half) = (optimizer.apply(start, UPDATES[0], pace=pace) for pace in (1.0, 0.5))
    assert np.allclose(half, whole / 2)
    assert np.array_equal(after.first_moment, after_half.first_moment)
    assert np.array_equal(after.second_moment, after_half.second_moment)
