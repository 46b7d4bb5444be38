"""What the model reads and where it is judged: borders exact, cuts where they are said to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedpt_secure.data import Record, TextTokenizer, encode
from fedpt_secure.data.examples import PairTemplate
from fedpt_secure.errors import ConfigError, DataError, ModelError

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEPARATOR, START, STOP = 0, 1, 2


def byte_tokenizer(controls=CONTROLS):
    """One id per byte after the control tokens: what is encoded can be read off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*controls, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return tokenizer


TOKENIZER = TextTokenizer(byte_tokenizer(), separator_id=SEPARATOR)
PLAIN = TextTokenizer(byte_tokenizer(("<|endoftext|>",)), separator_id=0)


def ids(text):
    return tuple(TOKENIZER.ids(text))


def test_plain_text_is_separator_and_text_with_loss_on_every_token():
    example = encode(Record("hello"), TOKENIZER, context_length=32)
    assert example.ids == (SEPARATOR, *ids("hello"))
    assert example.loss_from == 1


def test_plain_text_is_cut_at_the_end():
    assert encode(Record("hello"), TOKENIZER, context_length=4).ids == (SEPARATOR, *ids("hel"))


def test_pair_has_the_chat_format_and_loss_on_response_and_end_only():
    example = encode(Record("4", prompt="2+2?"), TOKENIZER, context_length=64)
    before = (SEPARATOR, START, *ids("user\n2+2?"), STOP, *ids("\n"), START, *ids("assistant\n"))
    assert example.ids == (*before, *ids("4"), STOP)
    assert example.loss_from == len(before)


def test_pair_without_chat_tokens_is_plain_text_ended_by_the_separator():
    example = encode(Record("4", prompt="2+2?"), PLAIN, context_length=64)
    assert example.ids == (0, *PLAIN.ids("2+2?\n\n4"), 0)
    assert example.ids[example.loss_from :] == (*PLAIN.ids("4"), 0)


def test_callers_template_is_used():
    template = PairTemplate(opening=(), turn=(STOP,), end=())
    example = encode(Record("b", prompt="a"), TOKENIZER, context_length=8, template=template)
    assert example.ids == (SEPARATOR, *ids("a"), STOP, *ids("b"))


def test_long_prompt_loses_its_beginning():
    fixed = len(encode(Record("x", prompt="x"), TOKENIZER, context_length=64).ids) - 3
    example = encode(Record("yes", prompt="abcdefgh"), TOKENIZER, context_length=fixed + 4 + 3)
    text = TOKENIZER.text(example.ids)
    assert "user\nfgh\n" in text
    assert example.ids[example.loss_from :] == (*ids("yes"), STOP)


def test_prompt_and_response_both_too_long_share_the_room():
    fixed = len(encode(Record("x", prompt="x"), TOKENIZER, context_length=64).ids) - 3
    example = encode(Record("r" * 50, prompt="p" * 50), TOKENIZER, context_length=fixed + 10)
    assert example.ids[example.loss_from :] == ids("r" * 5)
    assert TOKENIZER.text(example.ids).count("p") == 5


@given(st.text(max_size=30), st.text(max_size=30), st.integers(2, 60))
def test_every_example_fits_and_has_a_position_with_loss(text, prompt, context_length):
    try:
        example = encode(Record(text, prompt), TOKENIZER, context_length=context_length)
    except DataError:
        assert text == ""
    except ConfigError:
        assert prompt
        assert context_length < 30
    else:
        assert len(example.ids) <= context_length
        assert 1 <= example.loss_from < len(example.ids)
        assert example.ids[0] == SEPARATOR
        judged = [token for token in example.ids[example.loss_from :] if token not in (SEPARATOR, START, STOP)]
        assert tuple(judged) == ids(text)[: len(judged)]


@given(st.lists(st.sampled_from([*CONTROLS, "<|", "|>", "im_end", " ", "a"]), max_size=8).map("".join))
def test_no_text_becomes_a_control_token(text):
    assert not {SEPARATOR, START, STOP} & set(TOKENIZER.ids(text))
    assert TOKENIZER.text(TOKENIZER.ids(text)) == text


def test_unguarded_tokenizer_would_let_text_become_a_control_token():
    assert STOP in byte_tokenizer().encode("a<|im_end|>").ids


def test_callers_tokenizer_is_not_changed():
    mine = byte_tokenizer()
    mine.enable_truncation(2)
    assert len(TextTokenizer(mine, separator_id=0).ids("abcdef")) == 6
    assert len(mine.encode("abcdef").ids) == 2
    assert not mine.encode_special_tokens


def test_text_far_beyond_the_context_is_not_tokenized():
    class Counting(TextTokenizer):
        longest = 0

        def ids(self, text):
            Counting.longest = max(Counting.longest, len(text))
            return super().ids(text)

    tokenizer = Counting(byte_tokenizer(), separator_id=0)
    encode(Record("a" * 10**6, prompt="b" * 10**6), tokenizer, context_length=64)
    assert Counting.longest <= 64 * tokenizer.longest_token


def test_context_without_room_is_refused():
    with pytest.raises(ConfigError, match="no room"):
        encode(Record("a"), TOKENIZER, context_length=1)
    with pytest.raises(ConfigError, match="no room"):
        encode(Record("a", prompt="b"), TOKENIZER, context_length=10)


def test_text_without_tokens_is_refused():
    with pytest.raises(DataError, match="encodes to no tokens"):
        encode(Record(""), TOKENIZER, context_length=8)


def test_separator_that_is_no_id_is_refused():
    with pytest.raises(ModelError, match="99999"):
        TextTokenizer(byte_tokenizer(), separator_id=99999)
