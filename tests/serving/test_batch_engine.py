"""Rows share forward passes and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedpt_secure.errors import BlackBoxError
from fedpt_secure.proxy import DecodingSettings, SteeringRule, generate
from fedpt_secure.serving.batch_engine import BatchEngine
from fedpt_secure.serving.engine import Job

RULE = SteeringRule(alpha=0.75)


def job(prompt, **changes) -> Job:
    fields = {
        "prompt": tuple(prompt),
        "arm": "proxied",
        "rule": RULE,
        "first_place": len(prompt) - 1,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
    }
    return Job(**(fields | changes))


def tokens(engine, row, steps):
    return [engine.step()[row].token for _ in range(steps)]


@pytest.fixture
def engine(large, pair):
    return BatchEngine(large, pair)


def test_rows_that_come_and_go_answer_as_generate_does(engine, large, pair):
    rules = [
        SteeringRule(alpha=0.0),
        RULE,
        SteeringRule(alpha=1.5),
        SteeringRule(alpha=0.5, shares=((0, 0.6), (3, 0.1))),
    ]
    jobs = [
        job([0, *range(40, 45 + length)], rule=rules[length % 4], temperature=length % 2 * 0.7, seed=length)
        for length in range(8)
    ]
    expected = []
    for wanted in jobs:
        settings = DecodingSettings(
            rule=wanted.rule, max_new_tokens=wanted.max_new_tokens, temperature=wanted.temperature
        )
        rng = np.random.default_rng(wanted.seed)
        expected.append(list(generate(large, pair, wanted.prompt, settings, rng, first_place=wanted.first_place)))
    answers, rows = [[] for _ in jobs], {}
    for moment in range(20):
        if moment < len(jobs):  # one more joins before every step
            (row,) = engine.admit([jobs[moment]])
            rows[row] = moment
        if not rows:
            break
        for row, choice in engine.step().items():
            answers[rows[row]].append(choice.token)
            if len(answers[rows[row]]) == jobs[rows[row]].max_new_tokens:
                engine.drop(row)
                del rows[row]
    assert answers == expected


def test_the_small_arm_is_the_tuned_small_lm(engine, pair):
    prompt = [0, 50, 60]
    (row,) = engine.admit([job(prompt, arm="small")])
    _, tuned = next(pair.score([pair.token_map.to_small(prompt)]))
    best = int(tuned[-1].argmax())
    assert engine.step()[row].token == int(pair.token_map.small_to_large[best])


class Counting:
    """A black box that counts its calls and fails when told."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = 0
        self.fails = False

    capabilities = property(lambda self: self.inner.capabilities)
    vocabulary = property(lambda self: self.inner.vocabulary)

    def start(self, prompts):
        return CountingSession(self, self.inner.start(prompts))


class CountingSession:
    def __init__(self, owner, inner):
        self.owner, self.inner = owner, inner

    def logprobs(self):
        return self.inner.logprobs()

    def append(self, ids):
        self.owner.calls += 1
        if self.owner.fails:
            raise BlackBoxError("the API is down")
        self.inner.append(ids)

    def join(self, prompts):
        self.inner.join(prompts)

    def select(self, rows):
        self.inner.select(rows)


def test_one_pass_of_the_large_model_advances_all_rows_and_none_runs_for_the_small_arm(large, pair):
    counted = Counting(large)
    engine = BatchEngine(counted, pair)
    rows = engine.admit([job([0, 50 + number]) for number in range(10)])
    for _ in range(4):
        engine.step()
    assert counted.calls == 3
    for row in rows:
        engine.drop(row)
    engine.admit([job([0, 50], arm="small")])
    for _ in range(4):
        engine.step()
    assert counted.calls == 3


def test_the_large_model_alone_is_reported_where_asked(engine, large):
    prompt = [0, 50, 60]
    steered, plain = engine.admit([job(prompt, told_apart=True, top_logprobs=3), job(prompt)])
    choices = engine.step()
    alone = next(large.score([prompt]))[-1]
    told = choices[steered].alone
    assert told.token == int(alone.argmax())
    assert told.token_logprob == pytest.approx(float(alone.max()), abs=1e-4)
    assert told.chosen_logprob == pytest.approx(float(alone[choices[steered].token]), abs=1e-4)
    assert told.changed == (choices[steered].token != told.token)
    assert choices[plain].alone is None
    assert choices[steered].top[0] == (choices[steered].token, choices[steered].logprob)
    (without,) = engine.admit([job(prompt, rule=SteeringRule(alpha=0.0), told_apart=True)])
    assert not engine.step()[without].alone.changed


def test_after_a_failure_every_row_fails_and_fresh_ones_do_not(large, pair):
    counted = Counting(large)
    engine = BatchEngine(counted, pair)
    (first,) = engine.admit([job([0, 50])])
    expected = engine.step()[first].token
    counted.fails = True
    with pytest.raises(BlackBoxError, match="down"):
        engine.step()
    counted.fails = False
    # One of the two models may be a token ahead by now, so going on would give wrong answers silently.
    with pytest.raises(BlackBoxError, match="down"):
        engine.step()
    with pytest.raises(BlackBoxError, match="down"):
        engine.admit([job([0, 51])])
    engine.drop(first)
    (again,) = engine.admit([job([0, 50])])
    assert engine.step()[again].token == expected


def test_a_job_that_is_refused_leaves_the_others_as_they_were(engine, large, pair):
    (row,) = engine.admit([job([0, 50, 60])])
    with pytest.raises(BlackBoxError, match="600 tokens"):
        engine.admit([job([0, 51]), job([0] * 600)])
    settings = DecodingSettings(rule=RULE, max_new_tokens=6)
    expected = list(generate(large, pair, [0, 50, 60], settings, np.random.default_rng(0), first_place=2))
    assert tokens(engine, row, 6) == expected
