"""The bytes each token stands for, and back: what identifies a token where an API answers in text instead of ids."""

from __future__ import annotations

import json
import re
from functools import cached_property

from tokenizers import Tokenizer

from fedpt_secure.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes of every token of a tokenizer, by id.

    Byte-level tokenizers (GPT-2's alphabet) and SentencePiece spellings (`▁` for a space, `<0x0A>` for a byte) are
    understood; control tokens stand for their own name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        settings = json.loads(tokenizer.to_str())
        byte_level = "ByteLevel" in json.dumps([settings.get("decoder"), settings.get("pre_tokenizer")])
        self._added = added = {token["id"] for token in settings.get("added_tokens", [])}
        alphabet = _byte_alphabet()
        by_string = tokenizer.get_vocab(with_added_tokens=True)
        self._bytes: list[bytes] = [b""] * (max(by_string.values()) + 1)
        for token, token_id in by_string.items():
            if token_id in added:
                content = token.encode()
            elif byte_level and all(character in alphabet for character in token):
                content = bytes(alphabet[character] for character in token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                content = bytes([int(match[1], 16)])
            else:
                content = token.replace("▁", " ").encode()
            self._bytes[token_id] = content

    def __getitem__(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def __len__(self) -> int:
        return len(self._bytes)

    def ids_of(self, content: bytes) -> tuple[int, ...]:
        """The ids of the tokens that stand for exactly these bytes; several tokens may."""
        return self._ids.get(content, ())

    @cached_property
    def plain(self) -> int:
        """A token that stands for one printable ASCII character or more, and nothing else: text wherever it is put.

        Raises:
            ModelError: there is none.
        """
        for content in (b"a", b" a", b"e", b"."):
            if ids := self.ids_of(content):
                return ids[0]
        for token_id, content in enumerate(self._bytes):
            if content.isalnum() and content.isascii() and token_id not in self._added:
                return token_id
        raise ModelError("the tokenizer has no token of plain text", hint="use the model's own tokenizer.json")

    @cached_property
    def _ids(self) -> dict[bytes, tuple[int, ...]]:
        ids: dict[bytes, tuple[int, ...]] = {}
        for token_id, content in enumerate(self._bytes):
            ids[content] = (*ids.get(content, ()), token_id)
        return ids


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as they are, the others moved behind U+0100, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
