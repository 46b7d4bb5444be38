"""Passages cover a text, in order, without exceeding their length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.data.passages import join_paragraphs, passages

texts = st.text("ab. \n\r\t!", max_size=200)


@given(texts, st.integers(1, 40))
def test_passages_hold_every_character_but_white_space_once_and_in_order(text, characters):
    cut = list(passages(text, characters=characters))
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= characters for piece in cut)


@given(st.lists(texts, max_size=4), st.integers(1, 40))
def test_text_in_parts_gives_what_the_whole_gives(parts, characters):
    assert list(join_paragraphs(parts, characters=characters)) == list(
        passages("\n\n".join(parts), characters=characters)
    )


def test_short_paragraphs_are_joined_and_long_ones_cut_at_sentences():
    text = "One.\n\nTwo.\n\n" + "A sentence. " * 3 + "\n \nLast"
    assert list(passages(text, characters=26)) == ["One.\n\nTwo.", "A sentence. A sentence.", "A sentence.\n\nLast"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word word word", ["word word", "word"]),
        ("abcdefghijklmno", ["abcdefghij", "klmno"]),
        ("", []),
        (" \n\n ", []),
        ("0123456789", ["0123456789"]),
    ],
)
def test_without_sentences_words_are_kept_whole_where_they_fit(text, expected):
    assert list(passages(text, characters=10)) == expected
