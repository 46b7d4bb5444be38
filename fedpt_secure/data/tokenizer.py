"""The large model's tokenizer, used so that no text can spell a control token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fedpt_secure.errors import ModelError

SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>")
"""Tokens that can open a sequence, in order of preference; each family of models has one."""


class TextTokenizer:
    """Text to large-vocabulary ids.

    **Guarantees.** `ids` never yields a control token, whatever the text spells: a record with `<|im_end|>` in it is
    encoded as those eight characters. Nothing is added, truncated or padded.

    Attributes:
        separator_id: opens every sequence.
        longest_token: characters of the longest token, an upper bound of what one id can stand for.
    """

    def __init__(self, tokenizer: Tokenizer, *, separator: str | None = None) -> None:
        """Args:
        tokenizer: copied; the caller's object is not changed.
        separator: the token that opens every sequence; the first of `SEPARATORS` the vocabulary has, if None.

        Raises:
            ModelError: the vocabulary has no such token.
        """
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        wanted = SEPARATORS if separator is None else (separator,)
        found = [identifier for name in wanted if (identifier := self.control_id(name)) is not None]
        if not found:
            raise ModelError(
                f"the tokenizer has none of the separator tokens {', '.join(wanted)}",
                hint="name the token that opens a sequence of this model",
            )
        self.separator_id = found[0]

    @classmethod
    def from_directory(cls, directory: Path, *, separator: str | None = None) -> TextTokenizer:
        """Read `tokenizer.json` of a model in Transformers format.

        Raises:
            ModelError: there is none, it cannot be read, or it has no separator.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory} has no tokenizer.json", hint="save the model with its fast tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise ModelError(f"{path} is not a readable tokenizer: {error}") from error
        return cls(tokenizer, separator=separator)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, control tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without any control token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None if the vocabulary has none of that name."""
        identifier: int | None = self._tokenizer.token_to_id(token)
        return identifier

    def text(self, ids: list[int]) -> str:
        """The text of some ids, control tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
