"""Proxy arithmetic against a naive float64 reference, and the invariances the formula promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import (
    restricted_logprobs,
    shifted_logprobs,
    shifted_token_logprobs,
    spread_logprobs,
    spread_token_logprobs,
    tuning_shift,
)


def naive_softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def naive_proxy(large, base, tuned, token_map, alpha, outside):
    """The definition, one token at a time, in float64 and outside log space."""
    p_large, p_base, p_tuned = naive_softmax(large), naive_softmax(base), naive_softmax(tuned)
    weights = []
    for token, p in enumerate(p_large):
        small = token_map.to_small([token])[0]
        if small == token_map.unknown_id and outside == "zero":
            weights.append(p)
        else:
            weights.append(p * (p_tuned[small] / p_base[small]) ** alpha)
    return [w / math.fsum(weights) for w in weights]


@st.composite
def cases(draw: st.DrawFn):
    """A token map with or without an unknown class, and logits for the three models."""
    size = draw(st.integers(2, 24))
    if draw(st.booleans()):
        table = draw(st.permutations(range(size)))
    else:
        table = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=size - 1))
        table.insert(draw(st.integers(0, len(table))), -1)
    token_map = TokenMap(table, size)
    logits = st.floats(-12, 12, width=32)
    large = draw(st.lists(logits, min_size=size, max_size=size))
    base, tuned = (draw(st.lists(logits, min_size=len(table), max_size=len(table))) for _ in range(2))
    return token_map, large, base, tuned


def as64(*values):
    return (torch.tensor(value, dtype=torch.float64) for value in values)


@given(cases(), st.floats(-2, 2), st.sampled_from(["unknown", "zero"]))
@settings(deadline=None, max_examples=100)
def test_the_proxied_distribution_is_the_definition(case, alpha, outside):
    token_map, large, base, tuned = case
    got = shifted_logprobs(*as64(large, base, tuned), token_map, alpha, outside=outside).exp().tolist()
    assert got == pytest.approx(naive_proxy(large, base, tuned, token_map, alpha, outside), rel=1e-9, abs=1e-12)


@given(cases(), st.lists(st.floats(-2, 2), min_size=1, max_size=3), st.sampled_from(["unknown", "zero"]))
@settings(deadline=None, max_examples=100)
def test_the_cheap_token_logprobs_equal_the_full_distribution_at_the_token(case, alphas, outside):
    token_map, large, base, tuned = case
    size = token_map.large_vocabulary_size
    large, base, tuned = (x.expand(size, -1) for x in as64(large, base, tuned))
    large = large.log_softmax(-1)
    targets = torch.arange(size)
    got = shifted_token_logprobs(large, base, tuned, targets, token_map, alphas, outside=outside)
    for row, alpha in zip(got, alphas, strict=True):
        full = shifted_logprobs(large, base, tuned, token_map, alpha, outside=outside)
        torch.testing.assert_close(row, full[targets, targets], rtol=1e-9, atol=1e-9)


@given(cases(), st.floats(-2, 2), st.floats(-50, 50), st.floats(-50, 50), st.sampled_from(["unknown", "zero"]))
@settings(deadline=None, max_examples=100)
def test_constants_on_any_models_logits_change_nothing(case, alpha, c, d, outside):
    token_map, large, base, tuned = case
    large, base, tuned = as64(large, base, tuned)
    before = shifted_logprobs(large, base, tuned, token_map, alpha, outside=outside)
    after = shifted_logprobs(large + c + d, base + c, tuned + d, token_map, alpha, outside=outside)
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


@given(cases(), st.floats(-3, 3))
@settings(deadline=None, max_examples=50)
def test_alpha_zero_and_an_untuned_model_both_give_the_large_model(case, alpha):
    token_map, large, base, tuned = case
    large, base, tuned = as64(large, base, tuned)
    alone = large.log_softmax(-1)
    torch.testing.assert_close(shifted_logprobs(large, base, tuned, token_map, 0.0), alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted_logprobs(large, base, base, token_map, alpha), alone, rtol=0, atol=1e-12)


@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_identical_vocabularies_reduce_to_the_equation_of_liu_et_al(size, seed):
    """softmax(s_M + s_M+ - s_M-), on raw logits (arXiv 2401.08565, equation 1)."""
    large, base, tuned = torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (3, size)))
    got = shifted_logprobs(large, base, tuned, TokenMap.identity(size), 1.0)
    torch.testing.assert_close(got, torch.log_softmax(large + tuned - base, -1), rtol=0, atol=1e-10)


def test_where_the_large_agrees_with_the_base_alpha_one_gives_the_tuned_classes_and_offset_zero_does_not():
    """Why the unknown class's own shift is the default: the other rule loses mass that tuning moved there."""
    token_map = TokenMap([4, -1, 1, 0], 7)
    base = torch.tensor([1.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    tuned = torch.tensor([1.0, 3.0, -0.5, 0.2], dtype=torch.float64)
    large = spread_logprobs(base, token_map)
    proxied = restricted_logprobs(shifted_logprobs(large, base, tuned, token_map, 1.0), token_map)
    torch.testing.assert_close(proxied, tuned.log_softmax(-1), rtol=0, atol=1e-12)
    zero = restricted_logprobs(shifted_logprobs(large, base, tuned, token_map, 1.0, outside="zero"), token_map)
    assert (zero - tuned.log_softmax(-1)).abs().max() > 0.3


def test_the_full_proxied_distribution_reveals_the_tuned_small_model():
    """Why proxy tuning adds no privacy: who sees both full distributions solves for the tuned model."""
    rng = np.random.default_rng(3)
    token_map = TokenMap([4, -1, 1, 0], 7)
    large = torch.from_numpy(rng.normal(0, 2, 7)).log_softmax(-1)
    base, tuned = torch.from_numpy(rng.normal(0, 2, (2, 4)))
    proxied = shifted_logprobs(large, base, tuned, token_map, 0.5)
    moved = (restricted_logprobs(proxied, token_map) - restricted_logprobs(large, token_map)) / 0.5
    torch.testing.assert_close((base + moved).log_softmax(-1), tuned.log_softmax(-1), rtol=0, atol=1e-12)


def test_outside_tokens_keep_the_large_models_proportions():
    token_map = TokenMap([0, -1], 4)
    large = torch.tensor([0.3, 2.0, -1.0, 0.1], dtype=torch.float64)
    base, tuned = as64([0.0, 0.0], [2.0, -1.0])
    for outside in ("unknown", "zero"):
        proxied = shifted_logprobs(large, base, tuned, token_map, 0.7, outside=outside)
        torch.testing.assert_close(proxied[1:].diff(), large[1:].diff(), rtol=0, atol=1e-12)


def test_a_token_the_api_excludes_stays_excluded_and_the_rest_is_a_distribution():
    token_map = TokenMap([0, -1, 1], 4)
    large = torch.tensor([-math.inf, 0.5, -math.inf, -math.inf]).log_softmax(-1)
    proxied = shifted_logprobs(large, torch.zeros(3), torch.tensor([9.0, 1.0, -2.0]), token_map, 1.0)
    assert proxied.tolist() == [-math.inf, 0.0, -math.inf, -math.inf]
    row = shifted_token_logprobs(
        large[None], torch.zeros(1, 3), torch.tensor([[9.0, 1.0, -2.0]]), torch.tensor([1]), token_map, [1.0]
    )
    assert row.item() == pytest.approx(0.0)


def test_float32_is_accurate_over_a_real_vocabularys_width_and_half_precision_is_widened():
    rng = np.random.default_rng(0)
    table = rng.permutation(49_152)[:8_192]
    table[17] = -1
    token_map = TokenMap(table, 49_152)
    large = torch.from_numpy(rng.normal(0, 5, (3, 49_152))).log_softmax(-1)
    base, tuned = torch.from_numpy(rng.normal(0, 4, (2, 3, 8_192)))
    targets = torch.tensor([int(token_map.outside[0]), int(table[0]), int(table[5])])
    exact = shifted_logprobs(large, base, tuned, token_map, 0.5).gather(-1, targets[:, None]).squeeze(-1)
    narrow = shifted_token_logprobs(large.float(), base.float(), tuned.float(), targets, token_map, [0.5])[0]
    torch.testing.assert_close(narrow.double(), exact, rtol=0, atol=2e-5)
    half = shifted_logprobs(large.bfloat16(), base.bfloat16(), tuned.bfloat16(), token_map, 0.5)
    assert half.dtype == torch.float32
    assert half.logsumexp(-1).abs().max() < 1e-5


def test_a_tiny_outside_mass_keeps_its_digits():
    """1 - exp(log mapped mass) would give 0 here, and so exclude what the API allows."""
    token_map = TokenMap([0, -1], 3)
    large = torch.tensor([0.0, -40.0, -41.0])
    unknown = restricted_logprobs(large, token_map)[1]
    assert unknown.item() == pytest.approx(-40 + math.log1p(math.exp(-1)), rel=1e-6)


@given(cases())
@settings(deadline=None, max_examples=50)
def test_a_spread_small_model_is_a_distribution_over_the_large_vocabulary(case):
    token_map, _, base, _ = case
    (small,) = as64(base)
    spread = spread_logprobs(small, token_map)
    assert spread.exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(restricted_logprobs(spread, token_map), small.log_softmax(-1), rtol=0, atol=1e-9)
    targets = torch.arange(token_map.large_vocabulary_size)
    at = spread_token_logprobs(small.expand(len(targets), -1), targets, token_map)
    torch.testing.assert_close(at, spread, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    token_map = TokenMap.identity(2)
    with pytest.raises(ConfigError, match="must be a finite number"):
        shifted_logprobs(torch.zeros(2), torch.zeros(2), torch.zeros(2), token_map, alpha)
    with pytest.raises(ConfigError, match="must be a finite number"):
        shifted_token_logprobs(*torch.zeros(3, 1, 2), torch.zeros(1, dtype=torch.int64), token_map, [0.5, alpha])


def test_widths_that_do_not_fit_the_map_are_refused_with_both_numbers():
    token_map = TokenMap([0, -1], 5)
    with pytest.raises(ModelError, match=r"large model gave 6 .* made for 5"):
        shifted_logprobs(torch.zeros(6), torch.zeros(2), torch.zeros(2), token_map, 1.0)
    with pytest.raises(ModelError, match=r"base small model gave 3 .* 2 small tokens"):
        shifted_logprobs(torch.zeros(5), torch.zeros(3), torch.zeros(2), token_map, 1.0)
    with pytest.raises(ModelError, match=r"tuned small model gave 3"):
        shifted_logprobs(torch.zeros(5), torch.zeros(2), torch.zeros(3), token_map, 1.0)
    with pytest.raises(ModelError, match=r"small model gave 3"):
        spread_logprobs(torch.zeros(3), token_map)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_small_model_that_diverged_is_an_error_not_a_nan_in_the_answer(bad):
    with pytest.raises(ModelError, match="not finite"):
        tuning_shift(torch.tensor([0.0, 0.0]), torch.tensor([0.0, bad]), TokenMap.identity(2))
