"""Speculation changes how many calls are made, never how the output is distributed."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy import engine as engine_module
from fedpt_secure.proxy import speculation as speculation_module
from fedpt_secure.proxy.black_box import Capabilities
from fedpt_secure.proxy.continuation_row import Request
from fedpt_secure.proxy.engine import DecodingEngine
from fedpt_secure.proxy.restated_session import RestatedSession
from fedpt_secure.proxy.sampling import DecodingSettings, Distribution, shaped
from fedpt_secure.proxy.speculation import AcceptanceRate, Speculation, look_up, residual
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

LARGE, SMALL, LENGTH = 5, 4, 3
TOKEN_MAP = TokenMap([2, 0, -1, 4], LARGE)
RULE = SteeringRule(0.8, ((0, 0.3), (2, 0.05)))
TABLES = {
    name: torch.log_softmax(1.5 * torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed)), dim=-1)
    for name, size, seed in (("large", LARGE, 0), ("base", SMALL, 1), ("tuned", SMALL, 2))
}


def after(name, text):
    """Each model looks two tokens back."""
    return TABLES[name][text[-2], text[-1]]


class TableBox:
    capabilities = Capabilities(
        full_vocabulary=True,
        largest_top_k=LARGE,
        prompt_logprobs=True,
        logit_bias=False,
        context_length=50,
        draft_scoring=True,
    )
    vocabulary = Vocabulary(tuple("abcde"), 0, (3,))

    def score(self, sequences):
        raise NotImplementedError

    def start(self, prompts):
        def tails(texts, counts):
            return [
                torch.stack([after("large", text[: len(text) - back]) for back in reversed(range(count))])
                for text, count in zip(texts, counts, strict=True)
            ]

        return RestatedSession(prompts, lambda texts: torch.stack([after("large", text) for text in texts]), tails)


class TableRows:
    """A small session that recomputes."""

    def __init__(self, prompts):
        self.rows = [list(prompt) for prompt in prompts]

    def logprobs(self):
        return tuple(torch.stack([after(side, row) for row in self.rows]) for side in ("base", "tuned"))

    def append(self, ids):
        for row, token in zip(self.rows, ids, strict=True):
            row.append(token)

    def join(self, prompts):
        self.rows += [list(prompt) for prompt in prompts]

    def select(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def score_draft(self, drafts):
        self.drafts = [list(draft) for draft in drafts]
        return [
            tuple(
                torch.stack([after(side, row + draft[:read]) for read in range(len(draft) + 1)])
                for side in ("base", "tuned")
            )
            for row, draft in zip(self.rows, self.drafts, strict=True)
        ]

    def keep(self, counts):
        self.rows = [row + draft[:count] for row, draft, count in zip(self.rows, self.drafts, counts, strict=True)]

    def rewind(self, counts):
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, counts, strict=True)]


class TablePair:
    token_map, context_length = TOKEN_MAP, 50

    def start(self, prompts):
        return TableRows(prompts)


PROMPT = (0, 4, 0, 4)
SETTINGS = DecodingSettings(rule=RULE, max_new_tokens=LENGTH, temperature=0.9, top_p=0.95, repetition_penalty=1.1)


def exact(wanted):
    """The probability of every answer, by enumeration."""
    found: dict[tuple[int, ...], float] = {}

    def walk(answer, probability):
        if len(answer) == wanted.max_new_tokens or (answer and answer[-1] == 3):
            found[answer] = probability
            return
        text = [*PROMPT, *answer]
        small = TOKEN_MAP.to_small(text)
        place = torch.tensor(len(answer))
        steered = steered_logprobs(
            after("large", text), after("base", small), after("tuned", small), TOKEN_MAP, wanted.rule, place
        )
        for token, chance in zip(*shaped(steered, wanted, text), strict=True):
            walk((*answer, int(token)), probability * chance)

    walk((), 1.0)
    return found


def sampled(wanted, speculation, draws):
    """How often each answer comes, over seeds 0 ... draws - 1, in one engine."""
    engine = DecodingEngine(TableBox(), TablePair(), speculation=speculation, largest_batch=64)
    answers: dict[int, tuple[int, ...]] = {}
    some = [
        Request(prompt=PROMPT, settings=dataclasses.replace(wanted, seed=seed), first_place=0) for seed in range(draws)
    ]
    for event in engine.run(some):
        answers[event.handle] = (*answers.get(event.handle, ()), event.token)
    return answers.values(), engine.counts


def p_value(answers, expected):
    """Chi-square over all answers; those expected fewer than 10 times are one class."""
    answers = list(answers)
    assert set(answers) <= set(expected)
    counts = dict.fromkeys(expected, 0)
    for answer in answers:
        counts[answer] += 1
    usual = [answer for answer in expected if expected[answer] * len(answers) >= 10]
    observed = [counts[answer] for answer in usual]
    wanted = [expected[answer] * len(answers) for answer in usual]
    rest = len(answers) - sum(wanted)
    if rest > 5:
        observed, wanted = [*observed, len(answers) - sum(observed)], [*wanted, rest]
    total = sum(observed)
    return stats.chisquare(observed, [value * total / sum(wanted) for value in wanted]).pvalue


SOURCES = {
    "both": Speculation(longest=3),
    "small": Speculation(longest=3, lookup=False),
    "lookup": Speculation(longest=3, small=False, shortest_match=1),
}
DRAWS = 1500


@pytest.mark.parametrize("name", SOURCES)
def test_answers_come_as_often_as_exact_enumeration_says(name):
    """Chi-square over 1,500 seeded answers; a right rule fails a given seed with probability 1e-4."""
    expected = exact(SETTINGS)
    assert math.isclose(sum(expected.values()), 1)
    answers, counts = sampled(SETTINGS, SOURCES[name], DRAWS)
    assert p_value(answers, expected) > 1e-4
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize(
    "broken",
    [
        lambda target, token, guessed_by, rng: (True, token),
        None,
    ],
    ids=["accepts-everything", "replaces-from-the-target"],
)
def test_a_broken_rule_is_caught_by_the_same_test(monkeypatch, broken):
    if broken is None:
        monkeypatch.setattr(speculation_module, "residual", lambda target, guessed_by: target)
    else:
        monkeypatch.setattr(engine_module, "accept", broken)
    # Without truncation every guess is possible, so that answers differ in frequency only.
    wanted = dataclasses.replace(SETTINGS, top_p=1.0, repetition_penalty=1.0)
    answers, _ = sampled(wanted, SOURCES["small"], DRAWS)
    assert p_value(answers, exact(wanted)) < 1e-6


@st.composite
def distributions(draw):
    ids = sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=5)))
    weights = np.array(draw(st.lists(st.integers(1, 9), min_size=len(ids), max_size=len(ids))), dtype=float)
    return Distribution(np.array(ids), weights / weights.sum())


@settings(max_examples=200, derandomize=True, deadline=None)
@given(target=distributions(), guessed_by=distributions())
def test_acceptance_and_replacement_add_up_to_the_target_exactly(target, guessed_by):
    """Leviathan et al. 2023, appendix A.1, by computation instead of by sampling."""
    left = residual(target, guessed_by)
    accepted = {t: guessed_by.of(t) * min(1, target.of(t) / guessed_by.of(t)) for t in guessed_by.ids.tolist()}
    refused = 1 - sum(accepted.values())
    for token in range(7):
        total = accepted.get(token, 0.0) + refused * left.of(token)
        assert total == pytest.approx(target.of(token), abs=1e-12)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), max_size=14),
    longest=st.integers(1, 5),
    shortest_match=st.integers(1, 3),
)
def test_a_lookup_goes_on_as_the_text_did_after_its_longest_latest_match(text, longest, shortest_match):
    got = look_up(text, longest=longest, shortest_match=shortest_match)
    for match in range(min(6, len(text) - 1), shortest_match - 1, -1):
        starts = [s for s in range(len(text) - match) if text[s : s + match] == text[len(text) - match :]]
        if starts:
            longer = list(text)
            for _ in range(longest):
                longer.append(longer[max(starts) + match + len(longer) - len(text)])
            assert got == longer[len(text) :]
            return
    assert got == []


def test_drafts_grow_where_guesses_are_right_and_shrink_where_they_are_wrong():
    rate = AcceptanceRate()
    middle = rate.best_length(16, 0.1)
    for _ in range(30):
        rate.update(accepted=8, examined=8)
    assert rate.best_length(16, 0.1) == 16
    for _ in range(60):
        rate.update(accepted=0, examined=1)
    assert rate.best_length(16, 0.1) == 1
    assert 1 < middle < 16
    # By enumeration of the expected tokens per cost at a rate of one half.
    half = AcceptanceRate(accepted=1.0, examined=2.0)
    pays = [(2 - 0.5**n) / (1 + 0.1 * n) for n in range(1, 17)]
    assert half.best_length(16, 0.1) == 1 + pays.index(max(pays))


@pytest.mark.parametrize(
    "change",
    [{"longest": 0}, {"longest": 65}, {"shortest_match": 0}, {"lookup_cost": -1.0}, {"small_cost": math.nan}],
    ids=str,
)
def test_speculation_out_of_range_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Speculation(**change)


def test_the_tables_differ_enough_for_the_tests_above_to_mean_something():
    for a, b in itertools.combinations(("base", "tuned"), 2):
        assert (TABLES[a] - TABLES[b]).abs().max() > 1
