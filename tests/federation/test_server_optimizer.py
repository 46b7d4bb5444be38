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
