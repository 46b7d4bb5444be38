"""Text that grows is the text of all tokens; stop strings are found wherever the tokens cut them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from fedpt_secure.proxy import TokenEvent
from fedpt_secure.serving.token_text import StopScanner, TokenText


def choice(token: int) -> TokenEvent:
    return TokenEvent(handle=0, token=token, text="", logprob=-1.0, top=(), alone=None, ending=None)


@pytest.mark.parametrize("text", ["plain words", "naïve café 東京 🧑‍🚀 \n\ttabs", "\u200b\ufffd", "ﷺ" * 5, "a\r\nb"])
def test_growing_text_is_the_decoded_whole(spelling, text):
    ids = spelling.encode(text, add_special_tokens=False).ids
    growing = TokenText(spelling).growing()
    assert "".join(growing.add(token) for token in ids) + growing.rest() == text


def test_any_tokens_grow_into_what_decoding_them_at_once_gives(spelling):
    """Random tokens hold parts of characters in any order."""
    simulation_rng, token_text = random.Random(1), TokenText(spelling)
    for _ in range(500):
        ids = simulation_rng.choices(range(49_152), k=simulation_rng.randint(1, 12))
        growing = token_text.growing()
        assert "".join(growing.add(token) for token in ids) + growing.rest() == spelling.decode(ids)


def test_tokens_of_other_tokenizers_grow_too():
    """SentencePiece style: a blank is a mark at a word's beginning, unknown characters are spelt in bytes."""
    words = ["<unk>", "\u2581hey", "\u2581you", "r", "<0xE6>", "<0x9D>", "<0xB1>", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [1, 2, 3, 4, 5, 6, 7]
    growing = TokenText(tokenizer).growing()
    assert "".join(growing.add(token) for token in ids) == tokenizer.decode(ids) == "hey your\u6771."


def test_the_bytes_of_tokens_are_the_bytes_of_the_text(spelling):
    text = "naïve 🧑‍🚀 東京"
    token_text = TokenText(spelling)
    ids = spelling.encode(text, add_special_tokens=False).ids
    assert b"".join(token_text.token(token)[1] for token in ids) == text.encode()
    assert token_text.token(spelling.token_to_id("<|im_end|>")) == ("<|im_end|>", b"<|im_end|>")


def test_every_token_of_the_vocabulary_has_bytes_that_decode_to_itself(spelling):
    token_text = TokenText(spelling)
    sample = random.Random(0).sample(range(20, spelling.get_vocab_size()), 2000)
    for token in sample:
        text, content = token_text.token(token)
        assert content.decode(errors="replace") == text == spelling.decode([token])


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_join_to_the_text_before_the_first_stop(text, cuts, stops):
    tokens, rest = [], text
    for length in cuts:
        tokens.append(rest[:length])
        rest = rest[length:]
    tokens.append(rest)
    scanner, pieces = StopScanner(stops), []
    for number, token in enumerate(tokens):
        pieces.append(scanner.add(token, choice(number)))
        if scanner.stopped:
            break
    else:
        pieces.append(scanner.rest())
    found = [text.index(stop) for stop in stops if stop in text]
    # The first stop in reading order wins, once the token that completes it has come.
    read = text[: sum(map(len, tokens[: len(pieces)]))]
    expected = text[: min((read.index(stop) for stop in stops if stop in read), default=len(text))]
    assert "".join(piece.text for piece in pieces) == expected
    assert scanner.stopped == bool(found)
    numbers = [made.token for piece in pieces for made in piece.choices]
    assert numbers == list(range(len(numbers)))
    # Every token that gave some of the text is reported.
    assert sum(len(tokens[number]) for number in numbers) >= len(expected)


def test_without_stop_strings_nothing_is_held_back():
    scanner = StopScanner(())
    assert scanner.add("hey", choice(1)).text == "hey"
    assert [made.token for made in scanner.add(" you", choice(2)).choices] == [2]
    assert scanner.rest().choices == ()
