"""Truncated answers: checked, and completed to a distribution that keeps all that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.errors import BlackBoxError
from fedpt_secure.proxy.top_logprobs import TopLogprobs, complete, dense

SIZE = 60


def distribution(seed, scale=3.0):
    return torch.tensor(np.random.default_rng(seed).normal(scale=scale, size=SIZE)).log_softmax(-1)


def top_of(logprobs, k):
    values, ids = logprobs.topk(k)
    return TopLogprobs.checked(ids.tolist(), values.tolist(), asked=k, vocabulary_size=SIZE)


@given(st.integers(0, 2**32), st.integers(1, SIZE), st.floats(0.0, 8.0))
def test_a_completed_row_keeps_what_is_known(seed, k, scale):
    large, shape = distribution(seed), distribution(seed + 1, scale)
    top = top_of(large, k)
    row = complete(top, shape)
    assert row.dtype == torch.float32
    assert abs(float(row.double().logsumexp(-1))) < 1e-5
    torch.testing.assert_close(row[torch.tensor(top.ids)].double(), torch.tensor(top.logprobs), atol=1e-5, rtol=1e-5)
    outside = row[[token for token in range(SIZE) if token not in set(top.ids.tolist())]]
    if outside.numel():
        assert float(outside.max()) <= top.logprobs[-1] + 1e-5
        assert bool(torch.isfinite(outside).all())


def test_the_tail_has_the_shapes_proportions_below_the_cap():
    large, shape = distribution(1), distribution(2)
    top = top_of(large, 5)
    row = complete(top, shape)
    outside = torch.tensor([token for token in range(SIZE) if token not in set(top.ids.tolist())])
    free = outside[row[outside] < top.logprobs[-1] - 1e-4]
    assert free.numel() > 10
    scale = (row[free] - shape[free]).double()
    torch.testing.assert_close(scale, scale.mean().expand(free.numel()), atol=1e-4, rtol=0)


def test_capping_agrees_with_filling_step_by_step():
    large, shape = distribution(3), distribution(4, scale=6.0)
    top = top_of(large, 8)
    cap, tail = top.logprobs[-1], 1 - math.exp(np.logaddexp.reduce(top.logprobs))
    weights = shape.exp().numpy().copy()
    weights[top.ids] = 0
    capped = np.zeros(SIZE, bool)
    while True:  # water filling: cap whoever is above, share the rest out again
        left = tail - capped.sum() * math.exp(cap)
        filled = np.where(capped, math.exp(cap), weights / weights[~capped].sum() * left)
        if not (over := (filled > math.exp(cap) * (1 + 1e-12)) & ~capped).any():
            break
        capped |= over
    assert capped.sum() > 1
    filled[top.ids] = np.exp(top.logprobs)
    np.testing.assert_allclose(complete(top, shape).exp().numpy(), filled, rtol=1e-4)


def test_a_shape_that_is_the_truth_gives_the_truth_back():
    large = distribution(5)
    torch.testing.assert_close(complete(top_of(large, 7), large), large.float(), atol=1e-5, rtol=1e-5)


def test_the_whole_vocabulary_needs_no_shape():
    large = distribution(6)
    torch.testing.assert_close(dense(top_of(large, SIZE), SIZE), large.float())
    torch.testing.assert_close(complete(top_of(large, SIZE), distribution(7)), large.float(), atol=1e-5, rtol=1e-5)
    with pytest.raises(BlackBoxError, match="holds 7 of 60"):
        dense(top_of(large, 7), SIZE)
    biased = TopLogprobs(np.arange(SIZE), np.full(SIZE, math.log(0.9 / SIZE)))
    with pytest.raises(BlackBoxError, match=r"mass of 0\.9, not 1"):
        dense(biased, SIZE)


def test_a_returned_mass_of_one_leaves_no_token_impossible():
    top = TopLogprobs.checked([3, 4], [math.log(0.6), math.log(0.4)], asked=2, vocabulary_size=SIZE)
    row = complete(top, distribution(8))
    assert bool(torch.isfinite(row).all())
    assert float(row.exp()[[3, 4]].sum()) > 1 - 1e-8


def test_excluded_tokens_stay_excluded():
    top = TopLogprobs.checked([3, 4, 5], [-0.1, -3.0, -3.4e38], asked=3, vocabulary_size=SIZE)
    row = complete(top, distribution(9))
    assert row[5] == -math.inf
    assert abs(float(row.double().logsumexp(-1))) < 1e-5


def test_scored_tokens_join_the_known_ones_and_known_ones_keep_their_value():
    large = distribution(10)
    top = top_of(large, 4)
    rest = [token for token in range(SIZE) if token not in set(top.ids.tolist())][:3]
    more = top.with_scores([int(top.ids[0]), *rest], [-9.0, *large[rest].tolist()])
    assert more.ids.tolist() == [*top.ids.tolist(), *rest]
    row = complete(more, distribution(11), bound=float(top.logprobs[-1]))
    torch.testing.assert_close(row[torch.tensor(more.ids)], large[torch.tensor(more.ids)].float(), atol=1e-5, rtol=1e-5)
    assert top.with_scores([int(top.ids[1])], [-1.0]) is top


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([1, 2], [-1.0], "2 tokens and 1 log-prob"),
        ([1, 60], [-1.0, -2.0], "token id 60"),
        ([1, -1], [-1.0, -2.0], "token id -1"),
        ([1, 1], [-1.0, -2.0], "token id 1 2 times"),
        ([1, 2], [-1.0, math.nan], "not at most 0"),
        ([1, 2], [-1.0, 0.01], "not at most 0"),
        ([1, 2], [-0.1, -0.2], "more than 1"),
        ([1], [-1.0], "1 tokens where 2"),
        ([], [], "0 tokens where 2"),
    ],
)
def test_senseless_answers_are_refused(ids, logprobs, message):
    with pytest.raises(BlackBoxError, match=message):
        TopLogprobs.checked(ids, logprobs, asked=2, vocabulary_size=SIZE)


def test_an_answer_with_the_texts_own_token_added_is_cut_to_the_likeliest():
    top = TopLogprobs.checked([1, 2, 50], [-3.0, -1.0, -9.0], asked=2, vocabulary_size=SIZE)
    assert top.ids.tolist() == [2, 1]
