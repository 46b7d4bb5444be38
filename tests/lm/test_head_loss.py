"""The head's loss and gradient over one array of logits are those of cross-entropy over two."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpt_secure.lm import head_loss as module
from fedpt_secure.lm.head_loss import head_loss

WIDTH, VOCABULARY = 16, 50


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    return (
        hidden,
        torch.randn(VOCABULARY, WIDTH, generator=generator),
        torch.randint(0, VOCABULARY, (rows,), generator=generator),
    )


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 200])
def test_loss_and_gradient_are_those_of_cross_entropy(rows):
    hidden, weight, targets = inputs(rows)
    loss = head_loss(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    expected = cross_entropy(hidden @ weight.T, targets)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_target_twice_in_a_block_counts_twice():
    hidden, weight, _ = inputs(4)
    targets = torch.tensor([5, 5, 5, 5])
    (gradient,) = torch.autograd.grad(head_loss(hidden, weight, targets), hidden)
    (wanted,) = torch.autograd.grad(cross_entropy(hidden @ weight.T, targets), hidden)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_no_more_than_a_block_of_logits_exists_at_a_time(monkeypatch):
    """And the backward pass makes none: it multiplies what the forward pass kept, `[positions, width]`."""
    hidden, weight, targets = inputs(200)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY:
                largest.append(out.shape[0])
            return out

    with Watch():
        loss = head_loss(hidden, weight, targets)
        assert max(largest) == module.BLOCK_ROWS
        largest.clear()
        loss.backward()
    assert largest == []


def test_bfloat16_is_near():
    hidden, weight, targets = inputs(100)
    (gradient,) = torch.autograd.grad(head_loss(hidden, weight.bfloat16(), targets), hidden)
    (wanted,) = torch.autograd.grad(head_loss(hidden, weight, targets), hidden)
    assert gradient.dtype == torch.float32
    assert 0 < (gradient - wanted).norm() / wanted.norm() < 0.02


def test_logits_that_overflow_give_a_gradient_that_is_not_finite():
    """So that it counts as zero, and is not taken for a small one."""
    hidden, weight, targets = inputs(3)
    (gradient,) = torch.autograd.grad(head_loss(hidden * 1e30, weight * 1e30, targets), hidden)
    assert not torch.isfinite(gradient).all()
