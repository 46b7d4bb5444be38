"""The books and the small vocabulary: what is read, what is held out, how ids map."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def corpus(tool):
    return tool("proxy_corpus")


def test_reserved_authors_never_reach_the_training_text(corpus, tmp_path):
    reserved = [*corpus.EXCLUDED_AUTHORS, *corpus.REHEARSAL_AUTHORS, *corpus.HELD_OUT_AUTHORS]
    path = tmp_path / "books.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for author in [*reserved, "Somebody Else"]:
            book = {"author": author, "title": "t", "text": f"Title: t\n-------\r\nwords by {author}\r\n\r\nmore"}
            lines.write(json.dumps(book) + "\n")
    text = "".join(corpus.book_paragraphs(path, None)).lower()
    assert "somebody else" in text
    assert not any(author.lower() in text for author in reserved)


def test_a_share_of_the_books_is_whole_books_and_the_same_ones_each_time(corpus, tmp_path):
    path = tmp_path / "books.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for index in range(200):
            book = {
                "author": "Somebody",
                "title": f"t{index}",
                "text": f"-------\nbook {index} one\n\nbook {index} two",
            }
            lines.write(json.dumps(book) + "\n")

    def books(share):
        found = [paragraph.lower().split()[1] for paragraph in corpus.book_paragraphs(path, None, share)]
        assert all(found.count(index) == 2 for index in found)
        return set(found)

    assert len(books(1.0)) == 200
    assert 30 < len(books(0.25)) < 70  # 50 expected, 6 the standard deviation
    assert books(0.25) <= books(0.5)


def test_small_vocabulary_maps_back_to_itself_and_sends_the_rest_to_unknown(corpus):
    mapping = np.asarray([0, 1, 2, 10, 500, -1])
    table = corpus.large_to_small(mapping)
    assert table[[0, 1, 2, 10, 500]].tolist() == [0, 1, 2, 3, 4]
    assert set(table[[3, 11, 40_000]].tolist()) == {5}
