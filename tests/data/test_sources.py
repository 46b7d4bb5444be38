"""The user's own text: every row is used or counted, every mistake is one line that says what would work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from fedpt_secure.config import DataConfig
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data import sources as sources_module
from fedpt_secure.data.hub import RepositoryMissing
from fedpt_secure.data.sources import read_source
from fedpt_secure.errors import ConfigError, DataError, FedptError
from fedpt_secure.progress import SILENT

ROWS = [{"user": index % 3, "text": f"text {index}", "kind": "ab"[index % 2]} for index in range(12)]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(sources_module, "hub_commit", lambda kind, repository: None)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def write_rows(tmp_path, rows, kind="jsonl"):
    import pyarrow
    from pyarrow import csv, parquet

    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if kind == "json":
        return write(path, json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))
    return str(path)


def read(source, cache, **settings):
    return read_source(DataConfig(source=source, **settings), cache=cache, progress=SILENT)


def pairs(raw):
    return [(row.client_id, row.record.text) for row in raw.rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_each_format_gives_the_same_rows(tmp_path, cache, kind):
    raw = read(write_rows(tmp_path, ROWS, kind), cache, client_column="user")
    assert pairs(raw) == [(str(row["user"]), row["text"]) for row in ROWS]


def test_prompt_and_response_become_a_pair(tmp_path, cache):
    rows = [
        {"q": "2+2?", "a": "4", "user": "u"},
        {"q": None, "a": "yes", "user": "u"},
        {"q": "x", "a": " ", "user": "u"},
    ]
    raw = read(write_rows(tmp_path, rows), cache, client_column="user", prompt_column="q", response_column="a")
    assert [(row.record.prompt, row.record.text) for row in raw.rows] == [("2+2?", "4"), ("", "yes")]
    assert raw.unusable == {"empty": 1}


def test_unusable_cells_are_counted_by_reason(tmp_path, cache):
    rows = [{"user": "a", "text": text} for text in ("fine", None, "  ", 5)]
    rows += [{"user": None, "text": "whose?"}, {"user": " ", "text": "whose?"}, {"user": [1], "text": "whose?"}]
    raw = read(write_rows(tmp_path, rows), cache, client_column="user")
    assert pairs(raw) == [("a", "fine")]
    assert raw.unusable == {"empty": 2, "not text": 1, "no client named": 3}
    assert raw.seen == 7


def test_csv_cells_are_text_whatever_they_look_like(tmp_path, cache):
    path = write(tmp_path / "a.csv", "user,text\n01,42\n01,NA\n01,\n1,true\n")
    raw = read(path, cache, client_column="user")
    assert pairs(raw) == [("01", "42"), ("01", "NA"), ("1", "true")]
    assert raw.unusable == {"empty": 1}


def test_byte_order_mark_is_not_text(tmp_path, cache):
    table = write(tmp_path / "a.csv", "\ufeffuser,text\nann,hi\n")
    assert pairs(read(table, cache, client_column="user")) == [("ann", "hi")]
    assert pairs(read(write(tmp_path / "a.txt", "\ufeffhi"), cache)) == [("a.txt", "hi")]


def test_whole_numbers_turned_into_floats_by_a_gap_still_name_clients(tmp_path, cache):
    rows = [{"user": 7.0, "text": "a"}, {"user": float("nan"), "text": "b"}, {"user": 1.5, "text": "c"}]
    raw = read(write_rows(tmp_path, rows, "parquet"), cache, client_column="user")
    assert pairs(raw) == [("7", "a")]
    assert raw.unusable == {"no client named": 2}


def test_folder_of_text_is_a_client_per_file(tmp_path, cache):
    write(tmp_path / "letters/ann.txt", "One.\n\nTwo.\n\n" + "Long sentence here. " * 60)
    write(tmp_path / "letters/sub/bob.txt", "Hi.")
    write(tmp_path / "letters/.hidden.txt", "no")
    raw = read(str(tmp_path / "letters"), cache)
    assert sorted({client for client, _ in pairs(raw)}) == ["ann.txt", "sub/bob.txt"]
    assert pairs(raw)[0][1].startswith("One.\n\nTwo.")
    assert max(len(text) for _, text in pairs(raw)) <= 1000


def test_empty_text_file_is_counted(tmp_path, cache):
    write(tmp_path / "letters/a.txt", "")
    write(tmp_path / "letters/b.txt", " \n\n \n")
    write(tmp_path / "letters/c.txt", "text")
    raw = read(str(tmp_path / "letters"), cache)
    assert pairs(raw) == [("c.txt", "text")]
    assert raw.unusable == {"empty": 2}


@pytest.mark.parametrize("name", ["a[1].jsonl", "what?.jsonl", "*.jsonl", "a b.jsonl", "{x}.jsonl"])
def test_file_name_is_not_taken_for_a_pattern(tmp_path, cache, name):
    write(tmp_path / "other1.jsonl", '{"user": "u", "text": "wrong"}')
    path = write(tmp_path / name, '{"user": "u", "text": "right"}')
    assert pairs(read(path, cache, client_column="user")) == [("u", "right")]


def test_text_files_can_be_dealt_to_simulated_clients(tmp_path, cache):
    for name in "ab":
        write(tmp_path / f"letters/{name}.txt", "\n\n".join(f"{name} {index} " + "x" * 600 for index in range(8)))
    config = DataConfig(source=str(tmp_path / "letters"), clients=4, partition="equal", minimum_records=2)
    text = load_federated_text(config, seed=0, cache=cache, progress=SILENT)
    assert text.client_ids == ("client-0", "client-1", "client-2", "client-3")
    assert "dealt equally to 4 simulated clients" in text.description


def test_folder_of_tables_is_read_as_one(tmp_path, cache):
    for index in range(3):
        write(tmp_path / f"parts/{index}.jsonl", json.dumps({"user": "u", "text": f"t{index}"}))
    assert pairs(read(str(tmp_path / "parts"), cache, client_column="user")) == [("u", "t0"), ("u", "t1"), ("u", "t2")]


def test_maximum_stops_reading(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"t{index}"}) + "\n" for index in range(50)))
    raw = read(path, cache, clients=2, partition="equal", maximum_records=7)
    assert len(raw.rows) == 7
    write(tmp_path / "f/a.txt", "\n\n".join("x" * 900 for _ in range(9)))
    assert len(read(str(tmp_path / "f"), cache, maximum_records=3).rows) == 3


def test_dirichlet_uses_labels_where_named(tmp_path, cache):
    path = write_rows(tmp_path, [*ROWS, {"user": 0, "text": "no label", "kind": None}])
    config = DataConfig(
        source=path, clients=2, partition="dirichlet", dirichlet_alpha=1e-6, label_column="kind", minimum_records=2
    )
    text = load_federated_text(config, seed=1, cache=cache, progress=SILENT)
    assert "mixtures of 'kind'" in text.description
    assert text.preparation.unusable == {"no label": 1}
    parity = [{int(record.text.split()[1]) % 2 for record in client.train + client.held_out} for client in text.clients]
    assert parity in ([{0}, {1}], [{1}, {0}])


def test_dirichlet_without_labels_says_that_it_skews_sizes(tmp_path, cache, progress):
    config = DataConfig(
        source=write_rows(tmp_path, ROWS), clients=3, partition="dirichlet", dirichlet_alpha=5.0, minimum_records=2
    )
    text = load_federated_text(config, seed=1, cache=cache, progress=progress)
    assert "dealt in Dirichlet(5) sizes" in text.description
    assert "12 records read" in progress.notes[-1]


@pytest.mark.parametrize(
    ("settings", "error", "message", "hint"),
    [
        ({"client_column": "usr"}, DataError, "no column 'usr', given as client_column", "user, text, kind"),
        ({"client_column": "user", "text_column": "body"}, DataError, "no column 'body'", "user, text, kind"),
        ({}, ConfigError, "nothing says whose a record is", "--client-column"),
        ({"client_column": "user", "label_column": "sort"}, DataError, "no column 'sort'", "kind"),
    ],
)
def test_wrong_columns_are_refused_with_those_that_are_there(tmp_path, cache, settings, error, message, hint):
    with pytest.raises(error, match=message) as caught:
        read(write_rows(tmp_path, ROWS), cache, **settings)
    assert hint in caught.value.hint


def test_text_column_is_asked_for_where_none_is_called_text(tmp_path, cache):
    with pytest.raises(ConfigError, match="which column") as caught:
        read(write_rows(tmp_path, [{"body": "x", "user": "u"}]), cache, client_column="user")
    assert "body, user" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', "cannot be read"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"user,text\n1,\xff\xfe\n", "cannot be read: 'utf-8'"),
        ("a.csv", b'user,text\n1,"open\n', "cannot be read"),
        ("a.csv", b"user,user\n1,2\n", "two of the same"),
        ("a.csv", b"user,\n1,2\n", "column without a name"),
        ("a.csv", b"user,text\n", "cannot be read|no rows"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "cannot be read"),
        ("a.xml", b"<a/>", "none of .jsonl"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_unreadable_file_is_one_line(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(str(tmp_path / name), cache, clients=1, partition="equal")
    assert "\n" not in str(caught.value)


def test_mixed_or_empty_folders_and_columns_for_text_are_refused(tmp_path, cache):
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="has no file"):
        read(str(tmp_path / "d"), cache)
    write(tmp_path / "d/a.txt", "x")
    with pytest.raises(ConfigError, match="plain text and has no columns; text_column given"):
        read(str(tmp_path / "d"), cache, text_column="text")
    write(tmp_path / "d/a.csv", "a,b\n1,2")
    with pytest.raises(DataError, match="mixes csv and text"):
        read(str(tmp_path / "d"), cache)
    write(tmp_path / "e/a.csv", "a,b\n1,2")
    write(tmp_path / "e/a.tsv", "a\tb\n1\t2")
    with pytest.raises(DataError, match=r"mixes .csv and .tsv"):
        read(str(tmp_path / "e"), cache)
    write(tmp_path / "f/a.csv", "a,b\n1,2")
    write(tmp_path / "f/b.csv", "a,c\n1,2")
    with pytest.raises(DataError, match="different columns"):
        read(str(tmp_path / "f"), cache)


def test_source_without_any_usable_row_is_refused(tmp_path, cache):
    config = DataConfig(source=write_rows(tmp_path, ROWS), client_column="kind", text_column="user")
    with pytest.raises(DataError, match="no usable record among 12: 12 not text"):
        load_federated_text(config, seed=0, cache=cache, progress=SILENT)


def test_empty_source_is_not_the_working_directory(cache):
    with pytest.raises(ConfigError, match="the source is empty"):
        read("", cache)


@pytest.mark.parametrize("source", ["./absent", "/absent/file", "absent.csv", "a b", "a/b/c"])
def test_absent_path_is_not_mistaken_for_a_hub_id(cache, source):
    with pytest.raises(DataError, match="no file or folder"):
        read(source, cache)


def test_hub_that_does_not_answer_is_one_line(cache):
    with pytest.raises(DataError, match="the Hugging Face hub does not answer"):
        read("someone/something", cache)


def test_missing_hub_repository_is_one_line(cache, monkeypatch):
    def missing(kind, repository):
        raise RepositoryMissing(f"no {kind} {repository}")

    monkeypatch.setattr(sources_module, "hub_commit", missing)
    with pytest.raises(FedptError, match="no dataset someone/something"):
        read("someone/something", cache)


def test_hub_data_set_is_read_at_its_commit_into_our_cache(cache, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(source, **options):
        asked.update(options, source=source)
        return datasets.Dataset.from_list([{"user": "u", "text": "t"}])

    monkeypatch.setattr(sources_module, "hub_commit", lambda kind, repository: "c0ffee" * 6 + "c0ff")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raw = read("someone/something", cache, client_column="user")
    assert pairs(raw) == [("u", "t")]
    assert asked["revision"].startswith("c0ffee")
    assert asked["cache_dir"] == str(cache.root / "datasets")
    assert "at c0ffeec0ffee" in raw.description


def test_library_settings_are_as_before_afterwards(tmp_path, cache):
    import datasets
    from huggingface_hub import constants

    def settings():
        return (
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
            datasets.logging.get_verbosity(),
            datasets.is_progress_bar_enabled(),
            constants.HF_HUB_CACHE,
            constants.HF_HUB_DISABLE_TELEMETRY,
        )

    before = settings()
    with pytest.raises(DataError):
        read(write(tmp_path / "bad.jsonl", "{"), cache, clients=1, partition="equal")
    assert settings() == before


def test_nothing_is_written_to_home_or_the_terminal(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    source = write_rows(tmp_path, ROWS)
    script = f"""
        from pathlib import Path
        from fedpt_secure.config import DataConfig
        from fedpt_secure.data import Cache, load_federated_text
        from fedpt_secure.progress import SILENT
        config = DataConfig(source={source!r}, client_column="user", minimum_records=2)
        text = load_federated_text(config, seed=0, cache=Cache(Path({str(tmp_path / "cache")!r})), progress=SILENT)
        assert len(text.clients) == 3
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (finished.stdout, finished.stderr) == ("", "")
    assert list(home.rglob("*")) == []
    assert not (tmp_path / "cache").exists()
