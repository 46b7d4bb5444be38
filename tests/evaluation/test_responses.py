"""Responses: each arm is decoded by its own rule, and the metrics are those of their definitions."""

from __future__ import annotations

import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.evaluation.responses import (
    ResponseTask,
    exact_match,
    final_number,
    has_final_number,
    number_match,
    respond,
    score_responses,
)
from fedpt_secure.proxy import SteeringRule

pytest.importorskip("rouge_score")


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    """Response `a b x d`, reference `a b c d e`: subsequence `a b d`, precision 3/4, recall 3/5, F 2/3."""
    scores = score_responses(["alpha beta omega delta"], ["alpha beta gamma delta epsilon"])
    assert scores["rouge_l"].tolist() == [pytest.approx(2 / 3)]
    assert score_responses(["", "alpha"], ["alpha", "Alpha!"])["rouge_l"].tolist() == [0.0, 1.0]


def test_exact_match_ignores_case_and_white_space_only():
    assert exact_match("The  Answer\nis 4", "the answer is 4") == 1
    assert exact_match("the answer is 4.", "the answer is 4") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,000", "1000"),
        ("it is 12.50 dollars.", "12.50"),
        ("from 5 to -3", "-3"),
        ("#### 5 apples and 3 pears", "5"),
        ("#### none, but 8 before\n####", "8"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_marked_one_else_the_last(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_equal_numbers_match_however_they_are_written():
    assert number_match("the total is 1000.0", "x\n#### 1,000") == 1
    assert number_match("the total is 1001", "x\n#### 1,000") == 0
    assert number_match("I do not know", "x\n#### 1,000") == 0


@given(st.text(max_size=200))
def test_any_text_is_scored(text):
    assert number_match(text, "#### 4") in (0.0, 1.0)
    assert exact_match(text, text) == 1.0


def test_number_match_is_reported_only_where_every_reference_has_a_final_number():
    assert has_final_number("a\n#### 4")
    assert not has_final_number("4 #### 4 and more")
    assert "number_match" in score_responses(["4", "5"], ["#### 4", "#### 4"])
    assert "number_match" not in score_responses(["4", "5"], ["#### 4", "four"])


def test_responses_and_references_must_pair_up():
    with pytest.raises(DataError, match=r"1 responses .* 2 references"):
        score_responses(["a"], ["a", "b"])


def test_without_the_package_there_is_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match="rouge-score") as caught:
        score_responses(["a"], ["b"])
    assert "--responses 0" in caught.value.hint


class Box:
    """Says token 3, then 4, then ends; its vocabulary has 5 tokens, 0 ends."""

    def __init__(self, order=(3, 4, 0)):
        from fedpt_secure.lm.vocabulary import Vocabulary
        from fedpt_secure.proxy import Capabilities

        self.order = order
        self.capabilities = Capabilities(
            full_vocabulary=True, largest_top_k=5, prompt_logprobs=True, logit_bias=False, context_length=16
        )
        self.vocabulary = Vocabulary(tuple("abcde"), 0, (0,))

    def start(self, prompts):
        box = self

        class Session:
            step = 0

            def logprobs(self):
                logits = torch.zeros(len(prompts), 5)
                logits[:, box.order[self.step]] = 9.0
                return logits.log_softmax(-1)

            def append(self, ids):
                self.step += 1

        return Session()


class Letters:
    @staticmethod
    def text(ids):
        return "".join("abcde"[index] for index in ids)


def test_a_response_ends_at_the_end_token_or_at_the_limit():
    tasks = [ResponseTask((0, 1), "de"), ResponseTask((0, 2, 2), "de")]
    alone = SteeringRule(alpha=0.0)
    assert respond(tasks, Box(), None, alone, Letters, max_new_tokens=9, name="x") == ["de", "de"]
    assert respond(tasks, Box(), None, alone, Letters, max_new_tokens=1, name="x") == ["d", "d"]
    with pytest.raises(DataError, match="no held-out prompt"):
        respond([], Box(), None, alone, Letters, max_new_tokens=1, name="x")


def test_scores_are_one_a_record():
    scores = score_responses(["a b", "c"], ["a b", "d"])
    assert all(isinstance(values, np.ndarray) and values.shape == (2,) for values in scores.values())
