"""The guard: requests beyond the capabilities are refused, and no senseless answer gets through."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fedpt_secure.errors import BlackBoxError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.black_box import BlackBoxLM, Capabilities, GuardedBlackBox, check_logprobs, guard
from fedpt_secure.proxy.restated_session import RestatedSession

SIZE = 5
DENSE = Capabilities(full_vocabulary=True, largest_top_k=SIZE, prompt_logprobs=True, logit_bias=False, context_length=6)


class Uniform:
    """A black box that knows nothing; `spoil` changes each answer on its way out."""

    def __init__(self, capabilities=DENSE, spoil=lambda answer: answer, answers=None):
        self.capabilities = capabilities
        self.vocabulary = Vocabulary(tuple("abcde"), 0, (1,))
        self.spoil = spoil
        self.answers = answers
        self.appended: list[list[int]] = []

    def _rows(self, rows):
        return self.spoil(torch.full((rows, SIZE), -math.log(SIZE)))

    def score(self, sequences):
        for sequence in sequences if self.answers is None else [[0]] * self.answers:
            yield self._rows(len(sequence))

    def start(self, prompts):
        box = self

        class Running:
            def logprobs(self):
                return box._rows(len(prompts))

            def append(self, ids):
                box.appended.append(list(ids))

        return Running()


def spoiled(row, column, value):
    def spoil(answer):
        answer[row, column] = value
        return answer

    return spoil


def test_the_guard_lets_a_sound_black_box_through_unchanged():
    box = guard(Uniform())
    assert isinstance(box, BlackBoxLM)
    assert [tuple(a.shape) for a in box.score([[0, 1], [2]])] == [(2, SIZE), (1, SIZE)]
    session = box.start([[0], [1, 2]])
    session.append([3, 4])
    assert session.logprobs().shape == (2, SIZE)
    assert box._inner.appended == [[3, 4]]
    assert guard(box) is box


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled(0, 1, math.nan),
        spoiled(0, 1, math.inf),
        spoiled(0, 1, 0.0),
        lambda answer: answer + 0.01,
        lambda answer: answer - 0.01,
        lambda answer: answer * math.inf,
        lambda answer: answer[:, :-1],
        lambda answer: answer[None],
        lambda answer: torch.cat([answer, answer]),
        lambda answer: answer.half(),
        lambda answer: answer.tolist(),
    ],
    ids=[
        "nan",
        "inf",
        "too-much",
        "shifted-up",
        "shifted-down",
        "all-minus-inf",
        "narrow",
        "deep",
        "long",
        "half",
        "list",
    ],
)
def test_no_senseless_answer_gets_through(spoil):
    box = guard(Uniform(spoil=spoil))
    with pytest.raises(BlackBoxError):
        list(box.score([[0]]))
    with pytest.raises(BlackBoxError):
        box.start([[0]]).logprobs()


def test_excluded_tokens_and_rounded_digits_are_accepted():
    answer = torch.tensor([[-math.inf, math.log(0.25), math.log(0.75), -math.inf, -math.inf]])
    check_logprobs(answer, rows=1, vocabulary_size=SIZE)
    check_logprobs((answer * 1e4).round() / 1e4, rows=1, vocabulary_size=SIZE)


def test_the_position_of_a_bad_row_is_named_however_deep_it_lies():
    answer = torch.full((300, SIZE), -math.log(SIZE))
    answer[211, 3] = math.nan
    with pytest.raises(BlackBoxError, match="position 211"):
        check_logprobs(answer, rows=300, vocabulary_size=SIZE)


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_too_few_or_too_many_answers_are_refused(answers):
    with pytest.raises(BlackBoxError, match=r"answered|more answers"):
        list(guard(Uniform(answers=answers)).score([[0], [0]]))


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[]], "empty"),
        ([[0], [0] * 7], "sequence 1 has 7 tokens"),
        ([[0, 5]], "id 5"),
        ([[-1]], "id -1"),
        ([], "no sequence"),
    ],
)
def test_a_request_that_makes_no_sense_never_reaches_the_black_box(sequences, message):
    box = guard(Uniform())
    with pytest.raises(BlackBoxError, match=message):
        box.score(sequences)
    with pytest.raises(BlackBoxError, match=message):
        box.start(sequences)


def test_a_continuation_past_the_context_or_of_the_wrong_width_is_refused():
    session = guard(Uniform()).start([[0] * 5, [0]])
    with pytest.raises(BlackBoxError, match="1 tokens were given for 2"):
        session.append([0])
    with pytest.raises(BlackBoxError, match="id 9"):
        session.append([0, 9])
    session.append([0, 0])
    with pytest.raises(BlackBoxError, match="context of 6"):
        session.append([0, 0])


def test_asking_for_more_than_the_api_can_do_names_the_alternative():
    truncated = guard(Uniform(dataclasses.replace(DENSE, full_vocabulary=False, largest_top_k=3)))
    for ask in (truncated.score, truncated.start):
        with pytest.raises(BlackBoxError, match="the 3 most likely at most") as caught:
            ask([[0]])
        assert "full vocabulary" in caught.value.hint
    stepwise = guard(Uniform(dataclasses.replace(DENSE, prompt_logprobs=False)))
    with pytest.raises(BlackBoxError, match="cannot score") as caught:
        stepwise.score([[0]])
    assert "start" in caught.value.hint
    stepwise.start([[0]])
    single = guard(Uniform(dataclasses.replace(DENSE, largest_batch=2)))
    session = single.start([[0], [1]])
    for ask in (lambda: single.start([[0]] * 3), lambda: session.join([[0]])):
        with pytest.raises(BlackBoxError, match="this black box takes 2") as caught:
            ask()
        assert "one session after the other" in caught.value.hint
    silent = guard(Uniform(dataclasses.replace(DENSE, largest_top_k=0, full_vocabulary=False)))
    with pytest.raises(BlackBoxError, match="returns none") as caught:
        silent.start([[0]])
    assert "llama.cpp" in caught.value.hint


def test_texts_are_scored_step_by_step_where_the_adapter_says_so():
    patient = guard(Uniform(dataclasses.replace(DENSE, prompt_logprobs=False, stepwise_scoring=True)))
    assert [tuple(answer.shape) for answer in patient.score([[0, 1]])] == [(2, SIZE)]


def test_the_interface_offers_log_probabilities_and_nothing_of_the_inside():
    offered = {name for name in dir(GuardedBlackBox) if not name.startswith("_")}
    assert offered == {"capabilities", "vocabulary", "score", "start"}


class Drafted(Uniform):
    """Scores drafts; `count` answers, whatever was asked."""

    def __init__(self, *, count=None, spoil=lambda answer: answer):
        super().__init__(dataclasses.replace(DENSE, draft_scoring=True), spoil)
        self.count = count

    def start(self, prompts):
        def tails(texts, counts):
            answers = [self._rows(count) for count in counts]
            return answers if self.count is None else (answers * 2)[: self.count]

        return RestatedSession(prompts, lambda texts: self._rows(len(texts)), tails)


def test_rows_come_and_go_and_their_room_is_counted_one_by_one():
    session = guard(Drafted()).start([[0] * 5])
    session.join([[1], [2, 3]])
    assert session.logprobs().shape == (3, SIZE)
    session.append([0, 0, 0])
    with pytest.raises(BlackBoxError, match="context of 6"):
        session.append([0, 0, 0])
    session.select([2, 1])
    session.score_draft([[0] * 3, [1] * 4])
    session.keep([2, 0])
    session.append([0, 0])
    with pytest.raises(BlackBoxError, match="context of 6"):
        session.score_draft([[0], []])
    for rows in ([], [0, 0], [2], [-1]):
        with pytest.raises(BlackBoxError, match="are not some of the 2 continuations"):
            session.select(rows)
    with pytest.raises(BlackBoxError, match="sequence 0 is empty"):
        session.join([[]])


def test_a_draft_must_be_scored_before_tokens_of_it_are_kept_and_settled_before_anything_else():
    session = guard(Drafted()).start([[0], [1]])
    with pytest.raises(BlackBoxError, match="no scored draft"):
        session.keep([0, 0])
    with pytest.raises(BlackBoxError, match="1 drafts were given for 2"):
        session.score_draft([[0]])
    with pytest.raises(BlackBoxError, match="id 5"):
        session.score_draft([[0], [5]])
    assert [tuple(scores.shape) for scores in session.score_draft([[0, 1], []])] == [(3, SIZE), (1, SIZE)]
    for ask in (
        session.logprobs,
        lambda: session.append([0, 0]),
        lambda: session.select([0]),
        lambda: session.join([[0]]),
        lambda: session.score_draft([[], []]),
    ):
        with pytest.raises(BlackBoxError, match="nothing said about it"):
            ask()
    for counts in ([3, 0], [0, 1], [-1, 0]):
        with pytest.raises(BlackBoxError, match="cannot be kept"):
            session.keep(counts)
    session.keep([1, 0])
    assert session.logprobs().shape == (2, SIZE)


def test_a_draft_is_not_sent_where_it_cannot_be_scored_and_bad_scores_do_not_get_through():
    with pytest.raises(BlackBoxError, match="several tokens") as caught:
        guard(Uniform()).start([[0]]).score_draft([[1]])
    assert "without speculation" in caught.value.hint
    with pytest.raises(BlackBoxError, match="scored 1 of 2"):
        guard(Drafted(count=1)).start([[0], [1]]).score_draft([[1], [1]])
    with pytest.raises(BlackBoxError, match="position 1 is not a distribution"):
        guard(Drafted(spoil=lambda a: spoiled(1, 0, 0.0)(a) if len(a) > 1 else a)).start([[0]]).score_draft([[1]])
