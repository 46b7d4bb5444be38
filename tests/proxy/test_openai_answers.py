"""What a server may answer, read: a distribution over our tokens or an error of the API, never anything else."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.errors import BlackBoxError
from fedpt_secure.proxy.openai_answers import AnswerReader, Choice, NoLogprobs, decode_completion
from tests.proxy.conftest import byte_tokenizer

TOKENS = TokenBytes(byte_tokenizer())
SIZE = len(TOKENS)
A, B = (TOKENS.ids_of(letter)[0] for letter in (b"a", b"b"))


def reader(*, echo=False) -> AnswerReader:
    return AnswerReader(TOKENS, vocabulary_size=SIZE, width=SIZE, echo=echo)


def only(**choice) -> Choice:
    """A choice as it comes over the network."""
    return decode_completion(json.dumps({"choices": [choice]}).encode()).choices[0]


names = st.one_of(
    st.integers(-2, 10**10).map(lambda token: f"token_id:{token}"),
    st.integers(-2, 10**10).map(str),
    st.binary(max_size=3).map(lambda content: "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)),
    st.sampled_from(["a", "b", "th", "é", "\ufffd", ""]),
    st.text(max_size=4),
)
numbers = st.floats(-1e3, 1.0)
places = st.none() | st.dictionaries(names, numbers, max_size=4)
entries = st.fixed_dictionaries({"logprob": numbers}, optional={"id": st.none() | st.integers(-2, 2**40)})
contents = st.builds(
    lambda first, top: first | {"top_logprobs": top},
    entries,
    st.lists(entries, max_size=4),
)
logprobs = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.none() | st.lists(names, max_size=3),
        "token_logprobs": st.none() | st.lists(st.none() | numbers, max_size=3),
        "top_logprobs": st.none() | st.lists(places, max_size=3),
        "content": st.none() | st.lists(contents, max_size=2),
    },
)
scored = st.none() | st.dictionaries(names, st.fixed_dictionaries({"logprob": numbers}), max_size=3)
choices = st.fixed_dictionaries(
    {"text": st.text(max_size=3)},
    optional={"logprobs": st.none() | logprobs, "prompt_logprobs": st.none() | st.lists(scored, max_size=3)},
)


@settings(max_examples=300)
@given(choices, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(1, 5))
def test_any_answer_is_a_distribution_over_our_tokens_or_an_error_of_the_api(said, echo, names_ids, place, top_k):
    choice, read = only(**said), reader(echo=echo)
    for row in (
        lambda: read.generated(choice, top_k, place=place),
        lambda: read.at(choice, place % 2, 2, top_k),
    ):
        try:
            top = row()
        except BlackBoxError:
            continue
        ids = top.ids.tolist()
        assert 1 <= len(ids) <= top_k
        assert len(set(ids)) == len(ids)
        assert all(0 <= token < SIZE for token in ids)
        assert sum(map(math.exp, top.logprobs)) <= 1 + 1e-3
    with contextlib.suppress(BlackBoxError):
        assert math.isfinite(read.own_score(choice, place, A))
    with contextlib.suppress(BlackBoxError):
        assert 0 <= read.chosen(choice, names_ids=names_ids) < SIZE


def test_names_of_all_dialects_mean_the_same_token():
    for named in ("a", f"token_id:{A}", "bytes:\\x61"):
        top = reader().generated(only(logprobs={"top_logprobs": [{named: -0.5}]}), 1)
        assert top.ids.tolist() == [A]
    content = [{"logprob": -0.5, "id": A, "top_logprobs": [{"logprob": -0.5, "id": A}]}]
    assert reader().generated(only(logprobs={"content": content}), 1).ids.tolist() == [A]


def test_a_prompts_position_is_read_where_the_server_puts_it():
    by_echo = only(logprobs={"top_logprobs": [None, {"a": -0.5}, {"b": -0.5}]})
    assert reader(echo=True).at(by_echo, 1, 2, 1).ids.tolist() == [A]
    beside = only(prompt_logprobs=[None, {str(B): {"logprob": -0.5}}])
    assert reader().at(beside, 1, 2, 1).ids.tolist() == [B]
    with pytest.raises(NoLogprobs):
        reader(echo=True).at(beside, 1, 2, 1)
    with pytest.raises(NoLogprobs):
        reader().at(by_echo, 1, 2, 1)


def test_a_choice_by_text_must_be_one_token():
    assert reader().chosen(only(text="a"), names_ids=False) == A
    with pytest.raises(BlackBoxError, match="not exactly one token"):
        reader().chosen(only(text="ab"), names_ids=False)


def test_ids_are_believed_only_of_a_server_that_names_them():
    said = only(text="a", logprobs={"tokens": [f"token_id:{B}"]})
    assert reader().chosen(said, names_ids=True) == B
    assert reader().chosen(said, names_ids=False) == A
