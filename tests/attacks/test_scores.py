"""Each score against its formula, written out by hand, and each view against what it must not know."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from fedpt_secure.attacks.blind import blind_gate
from fedpt_secure.attacks.scores import SCORES, RecordSignals
from fedpt_secure.attacks.views import Candidate, FullAnswer, TokenAnswer, TopKAnswer, endpoint_signals, restrict
from fedpt_secure.data import Example, Record

RECORD = RecordSignals(
    log_p=np.array([-1.0, -2.0, -3.0, -4.0, -10.0]),
    log_reference=np.array([-2.0, -2.0, -4.0, -4.0, -10.0]),
    text="hello hello hello",
    mean=np.array([-1.0, -1.0, -1.0, -1.0, -9.0]),
    deviation=np.array([1.0, 1.0, 1.0, 0.5, 1.0]),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ratio", 0.4),
        ("loss", -4.0),
        ("zlib", -20.0 / len(zlib.compress(b"hello hello hello"))),
        ("min_k", -10.0),
        ("min_k_plus", -6.0),
    ],
)
def test_a_score_is_its_formula(name, expected):
    assert SCORES[name](RECORD) == pytest.approx(expected)


def _answers(form):
    torch.manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(3, 100), -1)
    candidate = Candidate(Record("abc"), Example((0, 5, 6, 7), 1))
    return logprobs, restrict(logprobs, form), candidate


def test_a_full_answer_gives_the_tokens_own_log_probabilities_and_moments():
    logprobs, answer, candidate = _answers("full")
    signals = endpoint_signals(answer, answer, candidate)
    assert signals.log_p == pytest.approx([float(logprobs[row, token]) for row, token in enumerate((5, 6, 7))])
    p = logprobs[0].exp()
    mean = float((p * logprobs[0]).sum())
    assert signals.mean[0] == pytest.approx(mean, rel=1e-5)
    assert signals.deviation[0] == pytest.approx(math.sqrt(float((p * (logprobs[0] - mean) ** 2).sum())), rel=1e-4)


def test_a_top_k_answer_holds_k_tokens_and_what_is_missing_gets_no_more_than_the_last():
    logprobs, answer, candidate = _answers("top_k")
    assert isinstance(answer, TopKAnswer)
    assert answer.ids.shape == (3, 20)
    signals = endpoint_signals(answer, answer, candidate)
    for row, token in enumerate((5, 6, 7)):
        listed = token in answer.ids[row]
        own = float(logprobs[row, token])
        assert signals.log_p[row] == pytest.approx(own) if listed else signals.log_p[row] <= answer.logprobs[row].min()
    assert signals.mean is None


def test_a_token_answer_tells_hits_and_nothing_else():
    _, answer, candidate = _answers("token")
    assert isinstance(answer, TokenAnswer)
    signals = endpoint_signals(answer, answer, candidate)
    assert set(signals.log_p) <= {0.0, -1.0}
    assert set(TokenAnswer.__slots__) == {"ids"}


def test_min_k_plus_without_moments_is_an_error():
    with pytest.raises(ValueError, match="no moments"):
        SCORES["min_k_plus"](RecordSignals(RECORD.log_p, RECORD.log_reference, "x"))


def test_an_answer_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="full"):
        restrict(torch.zeros(1, 2), "logits")
    assert isinstance(restrict(torch.zeros(1, 2), "full"), FullAnswer)


def _records(rng, words, count):
    return [Record(" ".join(rng.choice(words, size=8))) for _ in range(count)]


def test_the_blind_gate_passes_random_splits_at_its_rate():
    """95 % of 100 are meant to pass; fewer than 88 do with a chance below 1e-2 (fixed seed)."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(50)]
    passed = [blind_gate(_records(rng, words, 60), _records(rng, words, 60), rng)["passed"] for _ in range(100)]
    assert sum(passed) >= 88


def test_the_blind_gate_notices_a_split_by_topic():
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(50)]
    by_topic = blind_gate(_records(rng, words[:35], 150), _records(rng, words[15:], 150), rng)
    assert not by_topic["passed"]
    assert by_topic["auc"]["low"] > 0.5
