"""The large model's tokenizer, used so that no text can spell a control token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.errors import ModelError


class TextTokenizer:
    """Text to ids of the large vocabulary.

    **Guarantees.** `ids` never yields a control token, whatever the text spells: a record with `<|im_end|>` in it is
    encoded as those characters. Nothing is added, truncated or padded.

    Attributes:
        separator_id: opens every sequence.
        longest_token: characters of the longest token, an upper bound of what one id can stand for.
    """

    def __init__(self, tokenizer: Tokenizer, *, separator_id: int) -> None:
        """Args:
        tokenizer: copied; the caller's object is not changed.
        separator_id: as the black box's vocabulary says.

        Raises:
            ModelError: the vocabulary has no such id.
        """
        if tokenizer.id_to_token(separator_id) is None:
            raise ModelError(f"the separator {separator_id} is not an id of the tokenizer")
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.separator_id = separator_id
        self.longest_token = max(map(len, self._tokenizer.get_vocab()))

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without any control token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None if the vocabulary has none of that name."""
        identifier: int | None = self._tokenizer.token_to_id(token)
        return identifier

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids, control tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> TokenBytes:
        """The bytes that each id stands for."""
        return TokenBytes(self._tokenizer)
