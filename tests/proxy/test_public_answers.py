"""Answers about public text: asked once, kept by content, checked when read, and their cost told beforehand."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import restricted_logprobs
from fedpt_secure.proxy.public_answers import AnswerCache, PublicText, TopClasses, ask_black_box


class Counting:
    """The black box, counting the texts it is asked about."""

    def __init__(self, inner, **changes):
        self._inner, self.asked, self.stop_after = inner, 0, None
        self.capabilities = replace(inner.capabilities, **changes)
        self.vocabulary = inner.vocabulary

    def score(self, sequences):
        for answer in self._inner.score(sequences):
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield answer


class Notes:
    def __init__(self):
        self.lines = []

    @contextmanager
    def task(self, name, total, *, unit=""):
        self.lines.append(f"task {name} of {total:g} {unit}")
        yield self

    def advance(self, amount=1):
        pass

    def describe(self, text):
        pass

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(1)
    return PublicText("six random texts", tuple((0, *rng.integers(3, 49_152, 3 + n).tolist()) for n in range(6)))


def kept(pair, directory, **changes):
    return AnswerCache(directory, **({"model": "m", "token_map": pair.token_map, "top_k": 20} | changes))


def test_a_text_is_asked_about_once_also_by_another_process(large, pair, text, tmp_path):
    box = Counting(large)
    first = ask_black_box(box, pair.token_map, text, kept(pair, tmp_path))
    again = ask_black_box(box, pair.token_map, text, kept(pair, tmp_path))
    assert box.asked == 6
    for one, other in zip(first.top, again.top, strict=True):
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("ids", "logprobs", "rest"))
    more = PublicText("seven", (*text.sequences, (0, 5, 6)))
    ask_black_box(box, pair.token_map, more, kept(pair, tmp_path))
    assert box.asked == 7


def test_an_interrupted_job_goes_on_with_the_first_text_that_was_not_answered(large, pair, text, tmp_path):
    box = Counting(large)
    box.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        ask_black_box(box, pair.token_map, text, kept(pair, tmp_path))
    box.stop_after = None
    ask_black_box(box, pair.token_map, text, kept(pair, tmp_path))
    assert box.asked == 6


def test_another_model_map_or_k_never_finds_an_answer(pair, text, tmp_path):
    other_map = TokenMap(np.roll(pair.token_map.small_to_large, 1), 49_152)
    caches = [
        kept(pair, tmp_path),
        kept(pair, tmp_path, model="n"),
        kept(pair, tmp_path, token_map=other_map),
        kept(pair, tmp_path, top_k=21),
    ]
    paths = [cache.path(sequence) for cache in caches for sequence in text.sequences]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "another file"])
def test_a_damaged_answer_is_shown_and_asked_for_again(damage, large, pair, text, tmp_path):
    box, cache, notes = Counting(large), kept(pair, tmp_path), Notes()
    ask_black_box(box, pair.token_map, text, cache)
    path = cache.path(text.sequences[2])
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 1
    elif damage == "another file":
        content = bytearray(cache.path(text.sequences[3]).read_bytes())
    path.write_bytes({"cut": content[:-3], "empty": b""}.get(damage, content))
    again = ask_black_box(box, pair.token_map, text, cache, notes)
    assert box.asked == 7
    assert any("damaged" in line for line in notes.lines)
    assert again.top[2].ids.shape[0] == len(text.sequences[2])


@pytest.mark.parametrize(("able", "calls"), [(True, 6), (False, 39)])
def test_the_cost_is_told_before_anything_is_asked(able, calls, large, pair, text, tmp_path):
    box = Counting(large, remote=True, leaves_this_machine=True, prompt_logprobs=able, stepwise_scoring=True)
    notes = Notes()
    ask_black_box(box, pair.token_map, text, kept(pair, tmp_path), notes)
    tokens = sum(map(len, text.sequences))
    assert tokens == 39
    said = [f"6 texts to ask about (0 in the cache), {tokens} tokens in at most {calls} calls", "LEAVE this machine"]
    assert all(part in notes.lines[0] for part in said)
    assert notes.lines[1].startswith("task")
    assert "minutes" in notes.lines[2]
    notes = Notes()
    ask_black_box(box, pair.token_map, text, kept(pair, tmp_path), notes)
    assert "nothing is asked" in notes.lines[0]
    assert "LEAVE" not in "".join(notes.lines)


def test_the_kept_classes_are_exact_and_the_others_share_the_rest_as_the_small_base_says(large, pair, text, tmp_path):
    answers = ask_black_box(large, pair.token_map, text, kept(pair, tmp_path))
    index = 3
    (dense,) = large.score([text.sequences[index]])
    exact = restricted_logprobs(dense, pair.token_map)
    base = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    filled = answers.classes(index, base)
    torch.testing.assert_close(filled.logsumexp(-1), torch.zeros(len(filled)), atol=1e-5, rtol=0)
    top = exact.topk(20).indices
    torch.testing.assert_close(filled.gather(1, top), exact.gather(1, top), atol=5e-3, rtol=1e-3)
    for row in range(len(filled)):
        others = [column for column in range(600) if column not in top[row].tolist()]
        shape = filled[row, others] - base[row, others]
        assert float(shape.max() - shape.min()) < 1e-4


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_cut_and_filled_again_is_a_distribution_with_the_same_head(top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    classes = (3 * torch.randn(2, 12, generator=generator)).log_softmax(-1)
    classes[0, 4] = -torch.inf
    classes = classes.log_softmax(-1)
    filled = TopClasses.of(classes, top_k).fill(torch.randn(2, 12, generator=generator).log_softmax(-1))
    torch.testing.assert_close(filled.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
    kept_ids = classes.topk(top_k).indices
    torch.testing.assert_close(filled.gather(1, kept_ids), classes.gather(1, kept_ids), atol=2e-2, rtol=2e-3)


def test_answers_take_six_bytes_a_class_and_four_a_position(large, pair, text, tmp_path):
    answers = ask_black_box(large, pair.token_map, text, kept(pair, tmp_path))
    assert answers.size_in_bytes == 39 * (6 * 20 + 4)


@pytest.mark.parametrize(("change", "message"), [({"top_k": 0}, "top_k"), ({"model": " "}, "named")])
def test_a_cache_needs_a_model_and_a_width(change, message, pair, tmp_path):
    with pytest.raises(ConfigError, match=message):
        kept(pair, tmp_path, **change)
