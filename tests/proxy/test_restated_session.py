"""A session over an API without state says what a session with state says, and asks no more often than it must."""

from __future__ import annotations

import pytest
import torch

from fedpt_secure.errors import BlackBoxError
from fedpt_secure.proxy.restated_session import RestatedSession


@pytest.fixture
def calls():
    return []


@pytest.fixture
def restated(large, calls):
    """The local model, asked with whole texts."""

    def ask(texts):
        calls.append([list(text) for text in texts])
        return torch.stack([scores[-1] for scores in large.score(texts)])

    def ask_tail(texts, counts):
        calls.append([list(text) for text in texts])
        return [scores[-count:] for scores, count in zip(large.score(texts), counts, strict=True)]

    return lambda prompts: RestatedSession(prompts, ask, ask_tail)


def test_it_answers_like_a_session_with_a_cache(large, restated):
    sessions = restated([[0, 5, 7], [0, 9]]), large.start([[0, 5, 7], [0, 9]])

    def same():
        torch.testing.assert_close(sessions[0].logprobs(), sessions[1].logprobs(), rtol=0, atol=1e-4)

    same()
    for session in sessions:
        session.append([3, 4])
        session.join([[0, 1, 2, 3]])
    same()
    for session in sessions:
        session.select([2, 0])
    same()
    scores = [session.score_draft([[8, 9], []]) for session in sessions]
    for mine, theirs in zip(*scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    for session in sessions:
        session.keep([1, 0])
    same()


def test_an_answer_is_asked_for_once_and_a_draft_is_one_call(restated, calls):
    session = restated([[0], [1, 2]])
    assert calls == []
    session.logprobs()
    session.logprobs()
    session.select([1])
    assert session.logprobs().shape[0] == 1
    assert len(calls) == 1
    session.score_draft([[3, 4, 5]])
    assert calls[1:] == [[[1, 2, 3, 4, 5]]]
    scored = session._scores[0][2]
    session.keep([2])
    assert torch.equal(session.logprobs()[0], scored)
    session.join([[6, 7]])
    session.logprobs()
    assert calls[2:] == [[[6, 7]]]


def test_an_api_that_cannot_score_a_draft_says_so():
    with pytest.raises(BlackBoxError, match="several tokens"):
        RestatedSession([[0]], lambda texts: torch.zeros(1, 1)).score_draft([[1]])
