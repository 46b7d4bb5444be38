"""The public text that the built-in proxy learns from: books, token streams, the small vocabulary.

Books are public-domain, one JSON object a line (`author`, `title`, `text`), gzip-compressed, and none of them
evaluation text. They are split by author, fixed here, so that no part of a held-out author is ever trained on. Other
text comes from `proxy_modern.py` and from the large model itself (`gpu_generation.py`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

SEPARATOR_ID = 0  # <|endoftext|>; opens every sequence
KEPT_SPECIAL_IDS = (0, 1, 2)  # <|endoftext|>, <|im_start|>, <|im_end|>: what the chat template needs
LARGE_VOCABULARY_SIZE = 49_152

# Shakespeare is evaluation text elsewhere in this project: never read for training, ranking or choosing.
EXCLUDED_AUTHORS = frozenset({"William Shakespeare"})
# Tuning domains of the public rehearsal (`choose_alpha.py`); two voices far from the rest.
REHEARSAL_AUTHORS = ("P.G. Wodehouse", "Henrik Ibsen")
# General held-out text, on which the proxy's loss and vocabulary coverage are reported.
HELD_OUT_AUTHORS = ("Philip K. Dick", "Edith Nesbit", "Nellie Bly", "Charles Darwin")

LOWERCASED_SHARE = 0.10
TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " "})


@dataclass(frozen=True)
class Stream:
    """Token ids of the large vocabulary, back to back.

    Attributes:
        ids: uint16 `[tokens]`.
        starts: int64 `[units]`; the first token of each paragraph, ascending.
    """

    ids: np.ndarray
    starts: np.ndarray


def draw(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same text is always treated the same way."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def book_paragraphs(path: Path, authors: Sequence[str] | None, share: float = 1.0) -> Iterator[str]:
    """Yield cleaned paragraphs, each ending in its own line break.

    The header (up to the dashed line) is cut, typographic quotes become ASCII as people type them, and line breaks
    inside a paragraph become spaces. Half of the books end paragraphs with one line break instead of two, and a
    `LOWERCASED_SHARE` of paragraphs is lower-cased: books alone teach neither short lines nor casual typing.

    Args:
        path: the gzip-compressed JSON lines.
        authors: only these; None takes everyone but the excluded, rehearsal and held-out authors.
        share: of the books, drawn by title.
    """
    reserved = EXCLUDED_AUTHORS | set(REHEARSAL_AUTHORS) | set(HELD_OUT_AUTHORS)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            book = json.loads(line)
            if (book["author"] in reserved) if authors is None else (book["author"] not in authors):
                continue
            text = book["text"].split("-------", 1)[-1].replace("\r\n", "\n").translate(TYPOGRAPHY)
            title = f"{book['author']}/{book['title']}"
            if draw(f"read/{title}") >= share:
                continue
            ending = "\n" if draw(title) < 0.5 else "\n\n"
            for index, paragraph in enumerate(re.split(r"\n\s*\n", text)):
                plain = re.sub(r"\s+", " ", paragraph).strip()
                if len(plain) < 2:
                    continue
                if draw(f"{title}/{index}") < LOWERCASED_SHARE:
                    plain = plain.lower()
                yield plain + ending


def tokenize(paragraphs: Iterator[str], tokenizer: Tokenizer) -> Stream:
    """Cut paragraphs into the large model's tokens; the start of each is remembered."""
    ids: list[np.ndarray] = []
    starts: list[int] = []
    position = 0
    batch: list[str] = []

    def flush() -> None:
        nonlocal position
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            starts.append(position)
            ids.append(np.asarray(encoding.ids, dtype=np.uint16))
            position += len(encoding.ids)
        batch.clear()

    for paragraph in paragraphs:
        batch.append(paragraph)
        if len(batch) == 4096:
            flush()
    flush()
    return Stream(np.concatenate(ids), np.asarray(starts, dtype=np.int64))


def cached_books(
    path: Path, tokenizer: Tokenizer, cache: Path, name: str, authors: Sequence[str] | None, share: float = 1.0
) -> Stream:
    """`tokenize(book_paragraphs(...))`, kept in `cache/books-NAME.safetensors`, or `books-NAME-SHARE` of a part."""
    target = cache / (f"books-{name}.safetensors" if share >= 1 else f"books-{name}-{share:g}.safetensors")
    if not target.exists():
        stream = tokenize(book_paragraphs(path, authors, share), tokenizer)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        save_file({"ids": stream.ids, "starts": stream.starts}, partial)
        partial.replace(target)
    return Stream(**load_file(target))


def rank_vocabulary(streams: Sequence[Stream], tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Choose the small vocabulary: which large ids it keeps.

    Each stream counts with equal weight whatever its length. A third voice is the tokenizer's own merge order,
    a Zipf law over ids: a low id was frequent in the web text the tokenizer was made from, which is far more and more
    modern text than ours. Kept whatever their rank: the chat template's special tokens and the single bytes, so that
    any text can be spelled.

    Returns:
        int64 `[size]`, large ids in ascending order but for the last entry, which is -1: the unknown token.
    """
    prior = 1.0 / (np.arange(LARGE_VOCABULARY_SIZE) + 50.0)
    score = prior / prior.sum()
    for stream in streams:
        counts = np.bincount(stream.ids, minlength=LARGE_VOCABULARY_SIZE)
        score = score + counts / counts.sum()
    strings = [tokenizer.id_to_token(index) or "" for index in range(LARGE_VOCABULARY_SIZE)]
    special = [index for index, string in enumerate(strings) if re.fullmatch(r"<[^<>\s]+>", string)]
    score[special] = -1.0
    always = [index for index, string in enumerate(strings) if len(string) == 1] + list(KEPT_SPECIAL_IDS)
    score[always] = np.inf
    kept = np.sort(np.argsort(-score, kind="stable")[: size - 1])
    return np.append(kept, -1).astype(np.int64)


def large_to_small(small_to_large: np.ndarray) -> np.ndarray:
    """int64 `[large vocabulary]`: the small id of each large id, the unknown id where there is none."""
    unknown = int(np.flatnonzero(small_to_large == -1)[0])
    table = np.full(LARGE_VOCABULARY_SIZE, unknown, dtype=np.int64)
    mapped = small_to_large >= 0
    table[small_to_large[mapped]] = np.flatnonzero(mapped)
    return table
