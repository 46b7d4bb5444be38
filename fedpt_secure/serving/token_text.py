"""From token ids to text as it grows, to the bytes of single tokens, and to the place where an answer stops."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fedpt_secure.proxy import TokenEvent


class TokenText:
    """The large model's tokenizer, read backwards.

    Args:
        tokenizer: the large model's; its control tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        added = tokenizer.get_added_tokens_decoder()
        self._controls = frozenset(token for token, what in added.items() if what.special)

    def token(self, token: int) -> tuple[str, bytes]:
        """The text of one token, with U+FFFD where it holds part of a character, and its bytes.

        Control tokens are spelt out: they are reported as alternatives, never as part of an answer.
        """
        content = self._bytes(token)
        if content is None:
            spelling = self._tokenizer.id_to_token(token) or ""
            content = (self._tokenizer.decode([token], skip_special_tokens=False) or spelling).encode()
        return content.decode(errors="replace"), content

    def growing(self) -> GrowingText:
        """An empty text to add tokens to."""
        if self._is_byte_level:
            return _GrowingBytes(self._bytes_in_text)
        return _GrowingPieces(self._tokenizer)

    def _bytes(self, token: int) -> bytes | None:
        """The bytes that a byte-level token stands for; None for any other."""
        spelling = self._tokenizer.id_to_token(token) or ""
        if not self._is_byte_level or not all(character in _BYTE_OF for character in spelling):
            return None
        return bytes(_BYTE_OF[character] for character in spelling)

    def _bytes_in_text(self, token: int) -> bytes:
        if token in self._controls:
            return b""
        return self.token(token)[1]


class GrowingText(Protocol):
    """Decodes token by token; a character that is spread over several tokens comes with the last of them."""

    def add(self, token: int) -> str:
        """The text that this token completes; often its own, sometimes none."""

    def rest(self) -> str:
        """What an unfinished character at the end is shown as."""


class _GrowingBytes:
    """Byte-level tokenizers: the tokens' bytes are the text's, whatever their order."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class _GrowingPieces:
    """Other tokenizers, whose tokens read differently by what stands before them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        piece: str | None = self._stream.step(self._tokenizer, token)
        return piece or ""

    def rest(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What may be shown now: some text and the choices that made it."""

    text: str
    choices: tuple[TokenEvent, ...]


class StopScanner:
    """Holds text back while it could still turn out to be the beginning of a stop string.

    Guarantees: the pieces' texts join to the whole text up to the first stop string, which is not part of it,
    whatever way the text is cut into tokens; every choice that contributes to the text is in one piece.

    Args:
        stops: not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._choices: list[tuple[int, TokenEvent]] = []  # how much of the held text there was before each choice
        self.stopped = False

    def add(self, text: str, choice: TokenEvent) -> Piece:
        """One choice and the text it completed; returns what is certain by now."""
        self._choices.append((len(self._held), choice))
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), whole=True)
        return self._release(len(self._held) - self._undecided())

    def rest(self, text: str = "") -> Piece:
        """What was held back when the answer ended without a stop string, and a last bit of text behind it."""
        self._held += text
        return self._release(len(self._held), whole=True)

    def _undecided(self) -> int:
        """Length of the longest ending of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if stop.startswith(self._held[-length:]):
                    longest = length
                    break
        return longest

    def _release(self, end: int, *, whole: bool = False) -> Piece:
        text, self._held = self._held[:end], self._held[end:]
        ready = [choice for place, choice in self._choices if place < end or (not self._held and place <= end)]
        self._choices = [(place - end, choice) for place, choice in self._choices[len(ready) :]]
        if whole:
            self._held, self._choices = "", []
        return Piece(text, tuple(ready))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest moves behind U+0100."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + place): byte for place, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()
