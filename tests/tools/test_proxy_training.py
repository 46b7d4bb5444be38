"""The distillation step: the fused head loss against the plain formula, and Muon's update."""

from __future__ import annotations

import pytest
import torch

VOCABULARY, WIDTH, ROWS, LENGTH, TOP_K = 40, 16, 6, 8, 5


@pytest.fixture(scope="module")
def training(tool):
    return tool("proxy_training")


@pytest.fixture
def batch(training):
    torch.manual_seed(3)
    ids = torch.stack([torch.randperm(VOCABULARY)[:TOP_K] for _ in range(ROWS * LENGTH)]).view(ROWS, LENGTH, TOP_K)
    answers = torch.rand(ROWS, LENGTH, TOP_K)
    answers = 0.8 * answers / answers.sum(-1, keepdim=True)
    answers[..., -1] = 0.0
    has_teacher = torch.rand(ROWS, LENGTH) < 0.5
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    return training.Batch(targets, targets, ids, answers * has_teacher[..., None], has_teacher)


def mixed_loss(hidden, weight, batch, share):
    """The loss of `head_loss` written plainly: (1 - share) CE + share * CE to {known top tokens, everything else}."""
    logprobs = (hidden.flatten(0, 1) @ weight.T).log_softmax(-1)
    hard = -logprobs.gather(1, batch.targets.flatten()[:, None])[:, 0]
    ids, q = batch.top_ids.flatten(0, 1), batch.top_probabilities.flatten(0, 1)
    used = q > 0
    top = logprobs.gather(1, ids)
    rest_p = 1 - (top.exp() * used).sum(1)
    soft = -(q * torch.where(used, top, 0.0)).sum(1) - (1 - q.sum(1)) * rest_p.log()
    mix = batch.has_teacher.flatten().float() * share
    return ((1 - mix) * hard + mix * soft).mean(), hard.mean()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fused_head_loss_has_the_gradient_of_the_plain_mixed_loss(training, batch, share):
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss, _ = training.head_loss(
        hidden, weight, batch, share, training.HeadKernels(compiled=False, chunk=7)
    )  # uneven chunks
    fused = torch.autograd.grad(loss, [hidden, weight])
    expected, hard = mixed_loss(hidden, weight, batch, share)
    plain = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(loss, hard)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_head_loss_notices_a_wrong_teacher(training, batch):
    hidden, weight = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    kernels = training.HeadKernels(compiled=False, chunk=1024)
    right = torch.autograd.grad(training.head_loss(hidden, weight, batch, 1.0, kernels)[0], weight)[0]
    batch.top_ids = (batch.top_ids + 1) % VOCABULARY
    wrong = torch.autograd.grad(training.head_loss(hidden, weight, batch, 1.0, kernels)[0], weight)[0]
    assert (right - wrong).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_muons_update_is_nearly_orthogonal(training, shape):
    """Newton-Schulz leaves all singular values near 1 (0.5 to 1.3), from a spread of a thousand."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, min(shape))) @ v
    values = torch.linalg.svdvals(training._orthogonal(matrix))
    assert values.max() < 1.35
    assert values.median() > 0.6
