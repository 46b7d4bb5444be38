"""What a token id means: the token strings of a model, by id, and the ids that open and end a text.

Two models agree when their *tokens* agree. Widths say nothing: models of one family pad their output layers
differently (Qwen2: 151,936 and 152,064 columns for the same tokens), so a `Vocabulary` holds the real tokens only and
every user of a model cuts its logits to `size`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from fedpt_secure.errors import ModelError

# Known names, best first. A token that only opens a text is preferred to one that also ends it.
_SEPARATORS = ("<|begin_of_text|>", "<bos>", "<s>", "<|endoftext|>", "</s>", "<eos>")
_ENDS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Attributes:
        tokens: the string of each id as the tokenizer spells it (byte-level alphabets included); all distinct.
        separator_id: the token that opens every sequence.
        end_ids: tokens at which a continuation ends, ascending; at least one.

    Raises:
        ModelError: two ids share a string, or a special id is not an id.
    """

    tokens: tuple[str, ...]
    separator_id: int
    end_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            seen: dict[str, int] = {}
            for token_id, token in enumerate(self.tokens):
                if token in seen:
                    raise ModelError(
                        f"the token {token!r} stands at ids {seen[token]} and {token_id}; each string may have one id",
                        hint="use the tokenizer.json the model was published with",
                    )
                seen[token] = token_id
        special = (self.separator_id, *self.end_ids)
        outside = [token_id for token_id in special if not 0 <= token_id < len(self.tokens)]
        if outside or not self.end_ids:
            raise ModelError(
                f"separator {self.separator_id} and end tokens {list(self.end_ids)}"
                f" must be ids below {len(self.tokens)}, with one end token or more",
                hint="name the separator and the end tokens by their strings",
            )

    @property
    def size(self) -> int:
        """The number of real tokens; a model's output layer may be wider, never narrower."""
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over the tokens in id order, each as 4 bytes of big-endian length and its UTF-8."""
        digest = hashlib.sha256()
        for token in self.tokens:
            encoded = token.encode()
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        return digest.hexdigest()

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, *, separator: str | None = None, ends: Sequence[str] | None = None
    ) -> Vocabulary:
        """The vocabulary of a tokenizer, added tokens included.

        Args:
            tokenizer: the tokenizer that cuts the text.
            separator: the token that opens a sequence; by default the first well-known name among the special tokens.
            ends: the tokens that end a continuation; by default every well-known name among the special tokens.

        Raises:
            ModelError: the ids have gaps, or a special token is neither named nor known.
        """
        by_string = tokenizer.get_vocab(with_added_tokens=True)
        tokens = [token for token, _ in sorted(by_string.items(), key=lambda item: item[1])]
        for expected, token in enumerate(tokens):
            if by_string[token] != expected:
                raise ModelError(
                    f"the tokenizer has no token with id {expected}; ids must run from 0 without a gap",
                    hint="use the tokenizer.json the model was published with",
                )
        special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
        chosen = separator or next((name for name in _SEPARATORS if name in special), None)
        ending = ends if ends is not None else [name for name in _ENDS if name in special]
        named = [chosen, *ending] if chosen is not None else []
        absent = [name for name in named if name not in by_string]
        if absent:
            raise ModelError(f"the tokenizer has no token {absent[0]!r}, which was named as a separator or an end")
        if chosen is None or not ending:
            raise ModelError(
                "the tokenizer has none of the known tokens that open or end a text",
                hint=f"known: {', '.join(dict.fromkeys(_SEPARATORS + _ENDS))}",
            )
        return cls(tuple(tokens), by_string[chosen], tuple(sorted({by_string[name] for name in ending})))

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """The vocabulary of a `tokenizer.json`.

        Raises:
            ModelError: the file is missing or is not a tokenizer.
        """
        return cls.from_tokenizer(load_tokenizer(path))

    def require_same_tokens(self, other: Vocabulary, *, name: str, other_name: str) -> None:
        """Return if both have the same tokens at the same ids.

        Raises:
            ModelError: they differ; the message names the first id at which they do.
        """
        for token_id, (mine, theirs) in enumerate(zip_longest(self.tokens, other.tokens)):
            if mine != theirs:
                raise ModelError(
                    f"token {token_id} is {_shown(mine)} in {name} and {_shown(theirs)} in {other_name}"
                    f" ({self.size} and {other.size} tokens): the two do not share a tokenizer",
                    hint="choose two models of one family",
                )


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        ModelError: the file is missing or is not a tokenizer.
    """
    if not path.is_file():
        raise ModelError(f"no tokenizer at {path}", hint="the directory of a model must hold its tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises the bare Exception class
        raise ModelError(
            f"{path} is not a readable tokenizer: {str(error).splitlines()[0]}", hint="copy the model's files again"
        ) from error


def _shown(token: str | None) -> str:
    return "absent" if token is None else repr(token)
