"""Whether a server's tokens are those of the tokenizer that cuts our text, asked before anything else is sent.

Ids mean nothing by themselves: a server with another vocabulary of the same width answers every request, wrongly. So a
text of known ids, drawn from all over the vocabulary, is cut by the server and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ModelError

PROBE_WORDS = 200
"""Tokens of the vocabulary, evenly spaced, that a probe text holds at least."""

_SENTENCES = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14159, isn't it?\n\n"
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # comment\n"
    "Grüße aus Köln, où l'été dure; привет, мир; 你好，世界; नमस्ते; \U0001f642\n"
)


def probe_text(tokenizer: TextTokenizer, tokens: TokenBytes) -> str:
    """Sentences in several scripts, and tokens from all over the vocabulary, one a word."""
    step = max(1, len(tokens) // PROBE_WORDS)
    words = []
    for token_id in range(0, len(tokens), step):
        try:
            word = tokens[token_id].decode()
        except UnicodeDecodeError:
            continue
        if word.isprintable() and not word.startswith("<"):
            words.append(word.strip())
    return _SENTENCES + " ".join(words)


def require_same_ids(ours: Sequence[int], theirs: Sequence[int], tokens: TokenBytes, *, server: str) -> None:
    """Return if a server cut a text as we do; a beginning-of-text token of its own in front is allowed.

    Raises:
        ModelError: naming the first place at which the two differ.
    """
    theirs = theirs[1:] if len(theirs) == len(ours) + 1 and list(theirs[1:]) == list(ours) else theirs
    for place, (own, other) in enumerate(zip_longest(ours, theirs)):
        if own != other:
            raise ModelError(
                f"{server} cuts a probe text into other tokens: token {place} is {_shown(own, tokens)} for our"
                f" tokenizer and {_shown(other, tokens)} there ({len(ours)} and {len(theirs)} tokens)",
                hint="give the tokenizer the server's model was published with (--large-tokenizer); a small LM with"
                " other tokens than the large one's cannot steer it: its shifts would land on other words",
            )


def _shown(token_id: int | None, tokens: TokenBytes) -> str:
    if token_id is None:
        return "absent"
    known = 0 <= token_id < len(tokens)
    return f"{token_id} ({tokens[token_id].decode(errors='replace')!r})" if known else f"{token_id} (not one of ours)"
