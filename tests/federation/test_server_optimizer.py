"""The server's step is the one of the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpt_secure.federation.server_optimizer import ADAM_EPSILON, ADAM_SECOND_MOMENT_DECAY, ServerOptimizer

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
