"""Token maps and vocabularies: what agrees is accepted, what differs is named."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer

SHIPPED = Path(str(resources.files("fedpt_secure.lm.builtin"))) / "tokenizer.json"


def vocabulary(*tokens: str) -> Vocabulary:
    return Vocabulary(tokens, 0, (0,))


def word_tokenizer(words: list[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


@st.composite
def maps_with_unknown(draw: st.DrawFn) -> TokenMap:
    large = draw(st.integers(2, 40))
    mapped = draw(st.lists(st.integers(0, large - 1), unique=True, max_size=large - 1))
    table = list(mapped)
    table.insert(draw(st.integers(0, len(mapped))), -1)
    return TokenMap(table, large)


class TestVocabulary:
    def test_the_shipped_tokenizer_has_smollm2s_tokens(self):
        shipped = Vocabulary.from_file(SHIPPED)
        assert shipped.size == 49_152
        assert shipped.tokens[shipped.separator_id] == "<|endoftext|>"
        assert [shipped.tokens[i] for i in shipped.end_ids] == ["<|endoftext|>", "<|im_end|>"]
        assert shipped.separator_id == 0
        assert shipped.end_ids == (0, 2)

    def test_the_digest_is_sha256_of_the_length_prefixed_tokens(self):
        tokens = ("a", "Ġb", "é")
        content = b"".join(len(t.encode()).to_bytes(4, "big") + t.encode() for t in tokens)
        assert vocabulary(*tokens).digest == hashlib.sha256(content).hexdigest()

    def test_the_digest_changes_with_the_order_and_with_the_cut_between_tokens(self):
        digests = {vocabulary(*tokens).digest for tokens in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", "c")]}
        assert len(digests) == 4

    def test_a_token_that_only_opens_a_text_is_preferred_as_the_separator(self):
        made = Vocabulary.from_tokenizer(
            word_tokenizer(["x", "y"], ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"])
        )
        assert made.tokens[made.separator_id] == "<|begin_of_text|>"
        assert [made.tokens[i] for i in made.end_ids] == ["<|end_of_text|>", "<|eot_id|>"]

    def test_an_ordinary_token_with_a_well_known_spelling_is_not_taken_for_special(self):
        with pytest.raises(ModelError, match="none of the known tokens"):
            Vocabulary.from_tokenizer(word_tokenizer(["</s>", "y"], []))

    def test_special_tokens_can_be_named(self):
        made = Vocabulary.from_tokenizer(word_tokenizer(["x", "y"], []), separator="y", ends=["x"])
        assert (made.separator_id, made.end_ids) == (1, (0,))
        with pytest.raises(ModelError, match="no token 'z'"):
            Vocabulary.from_tokenizer(word_tokenizer(["x", "y"], []), separator="z", ends=["x"])

    def test_ids_with_a_gap_are_refused_and_the_gap_is_named(self):
        gapped = Tokenizer(models.WordLevel({"</s>": 0, "b": 1, "c": 3}, "b"))
        with pytest.raises(ModelError, match="no token with id 2"):
            Vocabulary.from_tokenizer(gapped, separator="</s>", ends=["</s>"])

    def test_a_string_at_two_ids_is_refused(self):
        with pytest.raises(ModelError, match="'a' stands at ids 0 and 2"):
            vocabulary("a", "b", "a")

    @pytest.mark.parametrize(("separator", "ends"), [(3, (0,)), (-1, (0,)), (0, (7,)), (0, ())])
    def test_special_ids_must_be_ids(self, separator, ends):
        with pytest.raises(ModelError, match="must be ids below 3"):
            Vocabulary(("a", "b", "c"), separator, ends)

    def test_a_missing_or_corrupt_tokenizer_is_a_one_line_error(self, tmp_path):
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
        with pytest.raises(ModelError, match="not a readable tokenizer") as caught:
            load_tokenizer(tmp_path / "tokenizer.json")
        assert "\n" not in caught.value.message

    def test_the_first_difference_is_named(self):
        mine, theirs = vocabulary("a", "b", "c"), vocabulary("a", "X", "Y")
        mine.require_same_tokens(vocabulary("a", "b", "c"), name="one", other_name="two")
        with pytest.raises(ModelError, match=r"token 1 is 'b' in one and 'X' in two"):
            mine.require_same_tokens(theirs, name="one", other_name="two")
        with pytest.raises(ModelError, match=r"token 3 is absent in one and 'd' in two"):
            mine.require_same_tokens(vocabulary("a", "b", "c", "d"), name="one", other_name="two")


class TestTokenMap:
    @given(maps_with_unknown())
    @settings(deadline=None, max_examples=100)
    def test_every_large_token_belongs_to_exactly_one_small_class(self, token_map):
        ids = range(token_map.large_vocabulary_size)
        small = token_map.to_small(ids)
        for large_id, small_id in zip(ids, small, strict=True):
            mapped = large_id in token_map.small_to_large
            assert (token_map.small_to_large[small_id] == large_id) if mapped else small_id == token_map.unknown_id
        assert set(small) == set(range(token_map.small_vocabulary_size))
        assert set(token_map.outside) == {i for i in ids if small[i] == token_map.unknown_id}

    @given(maps_with_unknown())
    @settings(deadline=None, max_examples=50)
    def test_the_tensors_say_what_the_lists_say(self, token_map):
        tensors = token_map.tensors(torch.device("cpu"))
        ids = list(range(token_map.large_vocabulary_size))
        assert tensors.small_of_large.tolist() == token_map.to_small(ids)
        assert tensors.large_of_small.tolist() == [max(i, 0) for i in token_map.small_to_large]
        assert tensors.outside.tolist() == token_map.outside.tolist()
        assert all(tensor.dtype == torch.int64 for tensor in tensors)

    def test_identity_maps_every_token_to_itself(self):
        same = TokenMap.identity(5)
        assert same.unknown_id is None
        assert same.to_small([4, 0, 2]) == [4, 0, 2]
        assert same.outside.size == 0

    @pytest.mark.parametrize(
        ("table", "size", "message"),
        [
            ([0, -1, -1], 5, "small tokens 1 and 2 are both marked unknown"),
            ([0, 1, 0, -1], 5, "small tokens 0 and 2 both map to large token 0"),
            ([0, 5, -1], 5, "small token 1 maps to 5, which is not one of the 5 large tokens"),
            ([0, -2, -1], 5, "small token 1 maps to -2"),
            ([0, 1], 3, "large token 2 has no small token"),
            ([0, 1, -1], 2, "small token 2 is marked unknown, yet every large token is mapped"),
            ([], 2, "a token map is a list of ids"),
            ([0.5, 1.0], 2, "a token map is a list of ids"),
        ],
    )
    def test_a_broken_table_is_refused_and_the_offender_named(self, table, size, message):
        with pytest.raises(ModelError, match=message):
            TokenMap(table, size)

    @pytest.mark.parametrize("wrong", [-1, 5])
    def test_ids_of_another_vocabulary_are_refused(self, wrong):
        with pytest.raises(ModelError, match=f"token id {wrong} is not one of the 5 large tokens"):
            TokenMap.identity(5).to_small([0, wrong])

    def test_the_table_cannot_be_changed_afterwards(self):
        source = np.array([2, -1, 0])
        token_map = TokenMap(source, 4)
        source[0] = 1
        assert token_map.to_small([2]) == [0]
        with pytest.raises(ValueError, match="read-only"):
            token_map.small_to_large[0] = 1

    def test_the_digest_tells_maps_apart(self):
        maps = [
            TokenMap([0, -1], 3),
            TokenMap([-1, 0], 3),
            TokenMap([0, -1], 4),
            TokenMap([1, -1], 3),
            TokenMap.identity(2),
        ]
        assert len({m.digest for m in maps}) == len(maps)
        assert TokenMap([0, -1], 3).digest == maps[0].digest


class TestBetween:
    def test_equal_vocabularies_give_the_identity(self):
        made = TokenMap.between(vocabulary("a", "b", "c"), Vocabulary(("a", "b", "c"), 1, (2,)))
        assert made.small_to_large.tolist() == [0, 1, 2]
        assert made.unknown_id is None

    def test_tokens_agree_by_string_where_the_order_differs(self):
        assert TokenMap.between(vocabulary("a", "b", "c"), vocabulary("c", "a", "b")).to_small([0, 1, 2]) == [2, 0, 1]

    @pytest.mark.parametrize(
        ("small", "large", "message"),
        [
            (("a", "b", "c"), ("a", "x", "y"), "token 1 is 'b' in the small vocabulary and 'x' in the large"),
            (("a", "b"), ("a", "b", "c"), "token 2 is absent in the small vocabulary and 'c' in the large"),
            (("a", "b", "c"), ("a", "b"), "token 2 is 'c' in the small vocabulary and absent in the large"),
        ],
    )
    def test_differing_vocabularies_are_refused_naming_the_first_difference(self, small, large, message):
        with pytest.raises(ModelError, match=message):
            TokenMap.between(vocabulary(*small), vocabulary(*large))
