"""The four arms against a slow reference that scores one record at a time over the full vocabulary."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fedpt_secure.data.examples import Example
from fedpt_secure.errors import BlackBoxError, ConfigError, DataError
from fedpt_secure.evaluation.held_out import evaluate_arms
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.arithmetic import spread_logprobs
from fedpt_secure.proxy.black_box import Capabilities
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

LARGE = 40
LINEAR = SteeringRule(alpha=0.5)
RULES = [SteeringRule(alpha=0.0), LINEAR, SteeringRule(alpha=1.0), SteeringRule(0.5, ((0, 1.0), (1, 0.3), (3, 0.1)))]
TOKEN_MAP = TokenMap([3, -1, 17, 0, 21, 39], LARGE)
EXAMPLES = [
    Example((0, 3, 17, 5), 1),
    Example((0, 39, 8, 3, 3, 21, 2, 0, 11), 4),
    Example((0, 7), 1),
    Example((0, 3, 17, 9, 9), 4),
]


class MarkovModel:
    """Next-token logits that depend on the last two tokens: enough for a position or an order mixed up to show."""

    def __init__(self, seed, size):
        self.table = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (2, size, size)))

    def logprobs(self, ids):
        ids = torch.tensor(ids)
        previous = torch.cat([ids[:1], ids[:-1]])
        return (self.table[0][ids] + self.table[1][previous]).log_softmax(-1).float()


class LargeModel(MarkovModel):
    capabilities = Capabilities(
        full_vocabulary=True, largest_top_k=LARGE, prompt_logprobs=True, logit_bias=False, context_length=16
    )
    vocabulary = Vocabulary(tuple(map(str, range(LARGE))), 0, (1,))
    calls = 0

    def score(self, sequences):
        self.calls += 1
        for sequence in sequences:
            yield self.logprobs(sequence)


class Pair:
    token_map = TOKEN_MAP
    context_length = 16

    def __init__(self, base_seed=1, tuned_seed=2):
        self.base, self.tuned = MarkovModel(base_seed, 6), MarkovModel(tuned_seed, 6)

    def score(self, sequences):
        for sequence in sequences:
            yield self.base.logprobs(sequence), self.tuned.logprobs(sequence)


def slow_sums(large, pair, example, rule):
    """Negative log-likelihoods of one record, position by position."""
    small_ids = TOKEN_MAP.to_small(example.ids)
    sums = [0.0, 0.0, 0.0, 0.0]
    for position in range(example.loss_from, len(example.ids)):
        target = example.ids[position]
        big = large.logprobs(example.ids[:position])[-1].double()
        base, tuned = (side.logprobs(small_ids[:position])[-1].double() for side in (pair.base, pair.tuned))
        arms = (
            big,
            spread_logprobs(base, TOKEN_MAP),
            spread_logprobs(tuned, TOKEN_MAP),
            steered_logprobs(big, base, tuned, TOKEN_MAP, rule, torch.tensor(position - example.loss_from)),
        )
        sums = [total - arm[target].item() for total, arm in zip(sums, arms, strict=True)]
    return sums


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_arm_is_the_slow_reference_record_by_record(index, rule):
    large, pair = LargeModel(0, LARGE), Pair()
    result = evaluate_arms(EXAMPLES, large, pair, RULES)
    got = [result.large_base, result.small_base, result.small_tuned, result.proxy_tuned[rule]]
    assert [arm[index] for arm in got] == pytest.approx(slow_sums(large, pair, EXAMPLES[index], rule), abs=1e-4)
    assert result.tokens.tolist() == [3, 5, 1, 1]


def test_alpha_zero_is_the_large_base_and_a_pair_without_tuning_changes_nothing():
    large = LargeModel(0, LARGE)
    result = evaluate_arms(EXAMPLES, large, Pair(), [RULES[0]])
    assert result.proxy_tuned[RULES[0]] == pytest.approx(result.large_base, abs=1e-5)
    untuned = evaluate_arms(EXAMPLES, large, Pair(1, 1), [LINEAR])
    assert untuned.proxy_tuned[LINEAR] == pytest.approx(untuned.large_base, abs=1e-5)
    assert untuned.small_tuned == pytest.approx(untuned.small_base)


def test_one_pass_over_the_large_model_serves_every_rule():
    large = LargeModel(0, LARGE)
    evaluate_arms(EXAMPLES, large, Pair(), RULES)
    assert large.calls == 1


def test_prompt_tokens_carry_no_loss():
    """Changing what lies before `loss_from` changes the context, never the count; with no memory, not the sum."""
    large, pair = LargeModel(0, LARGE), Pair()
    for model in (large, pair.base, pair.tuned):
        model.table[1] = 0
    one, other = (
        evaluate_arms([Example((0, *prompt, 3, 17), 4)], large, pair, [LINEAR]) for prompt in ([8, 9, 3], [30, 2, 3])
    )
    assert one.tokens.tolist() == other.tokens.tolist() == [2]
    assert one.proxy_tuned[LINEAR] == pytest.approx(other.proxy_tuned[LINEAR])


def test_a_long_record_is_the_sum_of_its_chunks(monkeypatch):
    whole = evaluate_arms(EXAMPLES, LargeModel(0, LARGE), Pair(), RULES)
    monkeypatch.setattr("fedpt_secure.evaluation.held_out._ROWS_AT_ONCE", 2)
    chunked = evaluate_arms(EXAMPLES, LargeModel(0, LARGE), Pair(), RULES)
    assert chunked.proxy_tuned[LINEAR] == pytest.approx(whole.proxy_tuned[LINEAR])


def test_the_loss_is_over_tokens_not_over_records():
    result = evaluate_arms(EXAMPLES, LargeModel(0, LARGE), Pair(), [LINEAR])
    assert result.loss(result.large_base) == pytest.approx(result.large_base.sum() / 10)


def test_progress_counts_the_judged_tokens():
    class Counting:
        total = done = 0

        @contextmanager
        def task(self, name, total, *, unit=""):
            self.total = total
            yield self

        def advance(self, amount=1):
            self.done += amount

        def describe(self, text):
            pass

        def note(self, text):
            pass

    counting = Counting()
    evaluate_arms(EXAMPLES, LargeModel(0, LARGE), Pair(), [LINEAR], counting)
    assert counting.done == counting.total == 10


@pytest.mark.parametrize("example", [Example((0, 3), 2), Example((0,), 1), Example((0, 3), 0)])
def test_a_record_with_nothing_to_judge_is_refused_before_any_model_runs(example):
    large = LargeModel(0, LARGE)
    with pytest.raises(DataError, match="held-out record 1"):
        evaluate_arms([EXAMPLES[0], example], large, Pair(), [LINEAR])
    assert large.calls == 0


def test_no_records_and_no_rule_are_refused():
    with pytest.raises(DataError, match="no held-out record"):
        evaluate_arms([], LargeModel(0, LARGE), Pair(), [LINEAR])
    with pytest.raises(ConfigError, match="no steering rule"):
        evaluate_arms(EXAMPLES, LargeModel(0, LARGE), Pair(), [])


def test_a_black_box_that_excludes_a_held_out_token_is_an_error_not_an_infinite_loss():
    large = LargeModel(0, LARGE)
    large.table[:, :, 17] = -math.inf
    with pytest.raises(BlackBoxError, match=r"token 17 .* probability 0"):
        evaluate_arms(EXAMPLES, large, Pair(), [LINEAR])


def test_a_black_box_that_answers_nan_is_an_error():
    large = LargeModel(0, LARGE)
    large.table[0, 3, 4] = math.nan
    with pytest.raises(BlackBoxError, match="not a distribution"):
        evaluate_arms(EXAMPLES, large, Pair(), [LINEAR])
