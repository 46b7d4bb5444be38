"""Text as it grows: characters spread over tokens, and stop strings across them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.proxy.answer_text import AnswerText


def decoded(pieces):
    """A byte-level decoder: ids index the pieces."""
    return lambda ids: b"".join(pieces[token] for token in ids).decode(errors="replace")


def cut(content, borders):
    edges = [0, *sorted(borders), len(content)]
    return [content[a:b] for a, b in pairwise(edges)]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    content=st.one_of(st.text(alphabet="abé€😀\n", max_size=12).map(str.encode), st.binary(max_size=12)),
    borders=st.lists(st.integers(0, 40), max_size=10),
    stops=st.lists(st.text(alphabet="abé€😀\n", min_size=1, max_size=3), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop_string_however_it_is_cut(content, borders, stops):
    pieces = cut(content, [min(border, len(content)) for border in borders])
    answer, got = AnswerText(decoded(pieces), stops), ""
    whole = content.decode(errors="replace")
    places = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(places)] if places else whole
    for token in range(len(pieces)):
        got += answer.add(token)
        assert whole.startswith(got)
        if answer.stopped:
            break
    got += answer.finish()
    assert answer.stopped == bool(places)
    assert got == expected


def test_text_is_released_as_soon_as_it_is_certain():
    euro = "€".encode()
    answer = AnswerText(decoded([b"a", euro[:1], euro[1:], b" st", b"ay st", b"op!"]), ["stop"])
    assert [answer.add(token) for token in range(6)] == ["a", "", "€", " ", "stay ", ""]
    assert answer.stopped
    assert answer.finish() == ""


def test_the_earliest_stop_string_counts_not_the_first_named():
    answer = AnswerText(decoded([b"one two three"]), ["three", "two", "wo t"])
    assert answer.add(0) == "one "


@pytest.mark.parametrize("held", [b"st", b"\xe2\x82"])
def test_what_was_held_back_comes_at_the_end(held):
    answer = AnswerText(decoded([b"a", held]), ["stop"])
    assert answer.add(0) + answer.add(1) == "a"
    assert answer.finish() == held.decode(errors="replace")


def test_bytes_that_are_no_character_are_told_at_the_end_and_are_no_stop_string():
    answer = AnswerText(decoded([b"a", b"\xf0"]), ["\ufffd"])
    assert answer.add(0) + answer.add(1) == "a"
    assert answer.finish() == "\ufffd"
    assert not answer.stopped
