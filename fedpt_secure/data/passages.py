"""Cut running text into records: whole paragraphs where they fit, sentences or words where they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PASSAGE_CHARACTERS = 1000
"""Aimed-at length of a passage, in characters; about 200-250 tokens of English."""

_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")


def passages(text: str, *, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Consecutive paragraphs joined while they fit in `characters`; a longer paragraph is cut.

    A paragraph ends at an empty line. One that is too long is cut after the last sentence that fits, else after the
    last white space, else hard. Every character of the text but white space is in exactly one passage, in order; no
    passage is longer than `characters` or empty.
    """
    return join_paragraphs([text], characters=characters)


def join_paragraphs(texts: Iterable[str], *, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """`passages` of a text that comes in parts, each of one or more whole paragraphs; holds one part at a time."""
    gathered = ""
    for text in texts:
        for paragraph in _PARAGRAPH_BREAK.split(text.replace("\r\n", "\n").strip()):
            for piece in _pieces(paragraph, characters):
                joined = f"{gathered}\n\n{piece}" if gathered else piece
                if len(joined) <= characters:
                    gathered = joined
                    continue
                yield gathered
                gathered = piece
    if gathered:
        yield gathered


def _pieces(paragraph: str, characters: int) -> Iterator[str]:
    rest = paragraph.strip()
    while len(rest) > characters:
        # One more character than fits: white space right behind the limit is a good place to cut.
        window = rest[: characters + 1]
        ends = [match.end() for match in _SENTENCE_END.finditer(window)]
        if ends:
            cut = ends[-1]
        else:
            cut = max(window.rfind(" "), window.rfind("\n")) + 1 or characters
        piece = rest[:cut].strip()
        rest = rest[cut:].strip()
        if piece:
            yield piece
    if rest:
        yield rest
