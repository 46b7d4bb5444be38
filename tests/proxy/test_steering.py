"""Steering against a naive float64 reference, its identity cases, and wrong variants that the tests tell apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.config import ProxyConfig
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import restricted_logprobs, shifted_logprobs
from fedpt_secure.proxy.steering import (
    SteeringRule,
    steered_class_logprobs,
    steered_classes,
    steered_logprobs,
    steered_token_logprobs,
)

TOKEN_MAP = TokenMap([4, -1, 1, 0], 7)


def test_with_shares_too_the_full_distributions_reveal_the_tuned_small_model():
    """Each class's steered probability grows with its tuned one, for a normaliser that one equation fixes."""
    alpha, share = 0.5, 0.95
    rng = np.random.default_rng(3)
    large = torch.from_numpy(rng.normal(0, 2, 7)).log_softmax(-1)
    base, tuned = torch.from_numpy(rng.normal(0, 2, (2, 4)))
    steered = steered_logprobs(
        large, base, tuned, TOKEN_MAP, SteeringRule(alpha, ((0, share),)), torch.tensor(0, dtype=torch.int64)
    )
    seen = restricted_logprobs(steered, TOKEN_MAP).exp().numpy()
    linear = (restricted_logprobs(large, TOKEN_MAP) - alpha * base.log_softmax(-1)).exp().numpy()

    def tuned_at(normaliser):
        """p = (1 - s) linear t^alpha / normaliser + s t, solved for every class's t: a quadratic in t^(1/2)."""
        slope = (1 - share) * linear / normaliser
        return ((np.sqrt(slope**2 + 4 * share * seen) - slope) / (2 * share)) ** 2

    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tuned_at(middle).sum() > 1 else (middle, high)
    np.testing.assert_allclose(tuned_at(low), tuned.softmax(-1).numpy(), rtol=1e-9)


def probabilities(logits):
    weights = [math.exp(x) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def naive(large, base, tuned, token_map, alpha, share):
    """The definition, one token at a time, in float64 and outside log space; -inf excludes."""
    p_large, p_base, p_tuned = probabilities(large), probabilities(base), probabilities(tuned)
    classes = [token_map.to_small([token])[0] for token in range(len(large))]
    mass = [math.fsum(p for p, c in zip(p_large, classes, strict=True) if c == small) for small in range(len(base))]
    linear = [p * (p_tuned[c] / p_base[c]) ** alpha for p, c in zip(p_large, classes, strict=True)]
    own = [p_tuned[c] * p / mass[c] if p else 0.0 for p, c in zip(p_large, classes, strict=True)]
    linear, own = ([w / math.fsum(weights) for w in weights] for weights in (linear, own))
    return [(1 - share) * a + share * b for a, b in zip(linear, own, strict=True)]


@st.composite
def cases(draw: st.DrawFn):
    """A token map with or without an unknown class, logits for three models, a few excluded tokens, a rule, a place."""
    size = draw(st.integers(2, 20))
    if draw(st.booleans()):
        table = draw(st.permutations(range(size)))
    else:
        table = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=size - 1))
        table.insert(draw(st.integers(0, len(table))), -1)
    logits = st.floats(-10, 10, width=32)
    large = draw(st.lists(logits, min_size=size, max_size=size))
    for token in draw(st.lists(st.integers(0, size - 2), max_size=3)):
        large[token] = -math.inf
    base, tuned = (draw(st.lists(logits, min_size=len(table), max_size=len(table))) for _ in range(2))
    starts = sorted(draw(st.lists(st.integers(0, 6), unique=True, max_size=3)))
    shares = tuple((start, draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))) for start in starts)
    rule = SteeringRule(draw(st.sampled_from([0.0, 0.5, 1.3])), shares)
    return TokenMap(table, size), as64(large, base, tuned), rule, draw(st.integers(0, 8))


def as64(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def share_of(rule, place):
    return ([0.0] + [share for start, share in rule.shares if start <= place])[-1]


@given(cases())
@settings(deadline=None, max_examples=150)
def test_the_steered_distribution_is_the_definition_and_normalised(case):
    token_map, models, rule, place = case
    got = steered_logprobs(*models, token_map, rule, torch.tensor(place)).exp()
    expected = naive(*(x.tolist() for x in models), token_map, rule.alpha, share_of(rule, place))
    assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got.sum().item() == pytest.approx(1.0)
    assert (got[torch.isneginf(models[0])] == 0).all()


@given(st.lists(cases(), min_size=1, max_size=1), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_one_token_at_a_time_equals_the_full_distribution_for_every_rule_and_place(drawn, positions):
    ((token_map, models, rule, place),) = drawn
    size = token_map.large_vocabulary_size
    rules = [rule, SteeringRule(rule.alpha), SteeringRule(0.25, ((2, 0.5),))]
    large, base, tuned = (x.expand(positions, size, -1) for x in (models[0].log_softmax(-1), *models[1:]))
    targets = torch.arange(size).expand(positions, size)
    places = place + torch.arange(positions)[:, None].expand(positions, size)
    got = steered_token_logprobs(large, base, tuned, targets, token_map, rules, places)
    for row, one in zip(got, rules, strict=True):
        for position in range(positions):
            full = steered_logprobs(*models, token_map, one, torch.tensor(place + position))
            torch.testing.assert_close(row[position], full, rtol=1e-9, atol=1e-9)


@given(cases(), st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
@settings(deadline=None, max_examples=100)
def test_constants_on_any_models_logits_change_nothing(case, a, b, c):
    token_map, (large, base, tuned), rule, place = case
    place = torch.tensor(place)
    before = steered_logprobs(large, base, tuned, token_map, rule, place)
    after = steered_logprobs(large + a, base + b, tuned + c, token_map, rule, place)
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


@given(cases())
@settings(deadline=None, max_examples=50)
def test_without_shares_it_is_plain_proxy_tuning_and_at_alpha_zero_the_large_model(case):
    token_map, models, rule, place = case
    place = torch.tensor(place)
    plain = steered_logprobs(*models, token_map, SteeringRule(rule.alpha), place)
    torch.testing.assert_close(plain, shifted_logprobs(*models, token_map, rule.alpha), rtol=1e-9, atol=1e-9)
    alone = steered_logprobs(*models, token_map, SteeringRule(0.0, ((3, 0.0),)), place)
    assert torch.equal(alone, models[0].log_softmax(-1))


@given(cases())
@settings(deadline=None, max_examples=50)
def test_share_one_is_the_tuned_small_lm_over_the_classes_that_are_not_excluded(case):
    token_map, models, rule, place = case
    got = steered_logprobs(*models, token_map, SteeringRule(rule.alpha, ((0, 1.0),)), torch.tensor(place))
    allowed = ~torch.isneginf(restricted_logprobs(models[0], token_map))
    expected = torch.where(allowed, models[2], -math.inf).log_softmax(-1)
    torch.testing.assert_close(restricted_logprobs(got, token_map), expected, rtol=1e-9, atol=1e-9)


def test_the_shared_unknown_mass_keeps_the_large_models_proportions_and_an_even_spread_does_not():
    large, base, tuned = as64([0.1, -2.0, 0.4, 3.0, 1.0, -1.0, 0.0], [0.0] * 4, [1.0, 2.0, -1.0, 0.5])
    steered = steered_logprobs(large, base, tuned, TOKEN_MAP, SteeringRule(0.5, ((0, 0.6),)), torch.tensor(0))
    outside = torch.tensor(TOKEN_MAP.outside.copy())
    torch.testing.assert_close(steered[outside].diff(), large[outside].diff(), rtol=0, atol=1e-12)
    even = torch.logaddexp(
        math.log(0.4) + shifted_logprobs(large, base, tuned, TOKEN_MAP, 0.5)[outside],
        math.log(0.6) + (tuned.log_softmax(-1)[1] - math.log(len(outside))),
    )
    assert (even.diff() - large[outside].diff()).abs().max() > 0.5


def test_a_share_holds_from_its_place_on_and_none_before_the_first():
    rule = SteeringRule(0.5, ((1, 1.0), (3, 0.25), (10, 0.0)))
    assert rule.share_at(torch.tensor([0, 1, 2, 3, 9, 10, 500])).tolist() == [0, 1, 1, 0.25, 0.25, 0, 0]
    assert SteeringRule(0.5).share_at(torch.tensor([0, 7])).tolist() == [0, 0]


def test_each_position_of_a_batch_gets_the_share_of_its_own_place():
    """An off-by-one in places, or one share for the whole batch, gives another answer."""
    rng = np.random.default_rng(4)
    large, base, tuned = (torch.from_numpy(rng.normal(0, 2, (5, n))) for n in (7, 4, 4))
    rule = SteeringRule(0.5, ((0, 1.0), (1, 0.4), (3, 0.1)))
    places = torch.tensor([0, 1, 2, 3, 0])
    batch = steered_logprobs(large, base, tuned, TOKEN_MAP, rule, places)
    for row in range(5):
        alone = steered_logprobs(large[row], base[row], tuned[row], TOKEN_MAP, rule, places[row])
        torch.testing.assert_close(batch[row], alone, rtol=0, atol=1e-12)
    shifted = steered_logprobs(large, base, tuned, TOKEN_MAP, rule, places + 1)
    assert ((batch - shifted).abs().max(-1).values > 1e-3).tolist() == [True, False, True, False, True]


def test_classes_alone_suffice():
    """What distillation and the choice of constants keep is `[v]` a position; it gives the same answer."""
    rng = np.random.default_rng(5)
    large, base, tuned = (torch.from_numpy(rng.normal(0, 2, (6, n))) for n in (7, 4, 4))
    large, places, rule = large.log_softmax(-1), torch.arange(6), SteeringRule(0.7, ((0, 0.9), (2, 0.3)))
    classes = restricted_logprobs(large, TOKEN_MAP)
    steered = steered_classes(classes, base, tuned, TOKEN_MAP, rule, places)
    full = steered_logprobs(large, base, tuned, TOKEN_MAP, rule, places)
    torch.testing.assert_close(steered, restricted_logprobs(full, TOKEN_MAP), rtol=0, atol=1e-12)
    own = torch.tensor([0, 1, 2, 3, 1, 0])
    one = steered_class_logprobs(classes, base, tuned, own, TOKEN_MAP, [rule], places)
    torch.testing.assert_close(one[0], steered.gather(-1, own[:, None]).squeeze(-1), rtol=0, atol=1e-12)


def test_float32_is_accurate_over_a_real_vocabularys_width():
    rng = np.random.default_rng(0)
    table = rng.permutation(49_152)[:8_192]
    table[17] = -1
    token_map = TokenMap(table, 49_152)
    large = torch.from_numpy(rng.normal(0, 5, (3, 49_152))).log_softmax(-1)
    base, tuned = torch.from_numpy(rng.normal(0, 4, (2, 3, 8_192)))
    targets = torch.tensor([int(token_map.outside[0]), int(table[0]), int(table[5])])
    places, rule = torch.arange(3), SteeringRule(0.5, ((0, 0.9), (1, 0.2)))
    exact = steered_logprobs(large, base, tuned, token_map, rule, places).gather(-1, targets[:, None]).squeeze(-1)
    narrow = steered_token_logprobs(large.float(), base.float(), tuned.float(), targets, token_map, [rule], places)
    torch.testing.assert_close(narrow[0].double(), exact, rtol=0, atol=2e-5)
    full = steered_logprobs(large.bfloat16(), base.bfloat16(), tuned.bfloat16(), token_map, rule, places)
    assert full.dtype == torch.float32
    assert full.logsumexp(-1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("alpha", "shares", "said"),
    [
        (math.nan, (), "finite"),
        (math.inf, (), "finite"),
        (0.5, ((0, 1.01),), "0 to 1"),
        (0.5, ((0, -0.1),), "0 to 1"),
        (0.5, ((0, math.nan),), "0 to 1"),
        (0.5, ((-1, 0.5),), "ascend"),
        (0.5, ((3, 0.5), (3, 0.4)), "ascend"),
        (0.5, ((3, 0.5), (1, 0.4)), "ascend"),
    ],
)
def test_a_rule_that_is_none_is_refused(alpha, shares, said):
    with pytest.raises(ConfigError, match=said):
        SteeringRule(alpha, shares)


def test_places_widths_and_predictions_that_cannot_be_are_refused():
    rule, good = SteeringRule(0.5, ((0, 0.5),)), torch.zeros(4)
    with pytest.raises(ConfigError, match="place"):
        steered_logprobs(torch.zeros(7), good, good, TOKEN_MAP, rule, torch.tensor(-1))
    with pytest.raises(ConfigError, match="place"):
        steered_logprobs(torch.zeros(7), good, good, TOKEN_MAP, rule, torch.tensor(0.0))
    with pytest.raises(ConfigError, match="no steering rule"):
        steered_token_logprobs(torch.zeros(7), good, good, torch.tensor(0), TOKEN_MAP, [], torch.tensor(0))
    with pytest.raises(ModelError, match="large model gave 6"):
        steered_logprobs(torch.zeros(6), good, good, TOKEN_MAP, rule, torch.tensor(0))
    with pytest.raises(ModelError, match="tuned small model gave 5"):
        steered_logprobs(torch.zeros(7), good, torch.zeros(5), TOKEN_MAP, rule, torch.tensor(0))
    with pytest.raises(ModelError, match="not finite"):
        steered_logprobs(torch.zeros(7), good, good / 0, TOKEN_MAP, rule, torch.tensor(0))


def test_a_runs_settings_become_its_rule():
    texts, responses = ((0, 1.0), (1, 0.2)), ((0, 0.3),)
    settings = ProxyConfig(alpha=0.4, shares=texts, response_shares=responses)
    assert SteeringRule.of(settings, responses=False) == SteeringRule(0.4, texts)
    assert SteeringRule.of(settings, responses=True) == SteeringRule(0.4, responses)


def test_the_dial_takes_the_shares_with_it_and_ends_at_the_large_model_alone():
    rule = SteeringRule(alpha=0.5, shares=((0, 0.8), (2, 0.1)))
    assert rule.at_strength(0.5) == rule
    assert rule.at_strength(0.0) == SteeringRule(alpha=0.0)
    assert not rule.at_strength(0.0).needs_the_small_lm
    assert rule.at_strength(1.0) == SteeringRule(alpha=1.0, shares=((0, 1.0), (2, 0.2)))
    assert SteeringRule(alpha=0.0, shares=((0, 0.8),)).at_strength(1.0).shares == ((0, 0.8),)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            rule.at_strength(bad)
