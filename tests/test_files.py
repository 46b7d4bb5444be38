"""A reader sees the old content or the new one, and what a killed writer leaves can be told from the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from fedpt_secure import files


def test_a_file_is_created_whole_and_never_replaced(tmp_path):
    files.create_bytes(tmp_path / "ledger", b"first", mode=0o600)
    with pytest.raises(FileExistsError):
        files.create_bytes(tmp_path / "ledger", b"second")
    assert (tmp_path / "ledger").read_bytes() == b"first"
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]


def test_a_creation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.create_bytes(tmp_path / "ledger", b"first")
    assert list(tmp_path.iterdir()) == []


def _refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def _fill(text):
    def write(directory):
        (directory / "inner").mkdir()
        (directory / "inner" / "a").write_text(text)

    return write


def test_a_killed_write_leaves_the_old_file_and_a_temporary_that_is_swept(tmp_path):
    path = tmp_path / "state.json"
    files.write_text(path, "old")

    def write():
        os.replace = _die
        files.write_text(path, "new")

    _run_and_die(write)
    assert path.read_text() == "old"
    assert len(files.temporaries(path)) == 1
    files.sweep(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("name", [".state.json", ".state.json.partial", ".other.abcdefgh.partial", "state.json.bak"])
def test_what_no_write_left_is_not_swept(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    assert files.temporaries(tmp_path / "state.json") == []
    files.sweep(tmp_path / "state.json")
    assert (tmp_path / name).read_text() == "theirs"


def test_a_missing_folder_holds_no_temporaries(tmp_path):
    assert files.temporaries(tmp_path / "absent" / "state.json") == []


def test_a_directory_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        files.replace_directory(tmp_path / "adapter", _fill(text))
        assert (tmp_path / "adapter" / "inner" / "a").read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_directory_that_cannot_be_written_leaves_the_old_one(tmp_path):
    files.replace_directory(tmp_path / "adapter", _fill("old"))
    with pytest.raises(OSError, match="No space"):
        files.replace_directory(tmp_path / "adapter", _refuse)
    assert (tmp_path / "adapter" / "inner" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_swap_that_fails_half_way_puts_the_old_directory_back(tmp_path, monkeypatch):
    files.replace_directory(tmp_path / "adapter", _fill("old"))
    rename = os.rename
    monkeypatch.setattr("os.rename", lambda a, b: _refuse() if str(a).endswith("new") else rename(a, b))
    with pytest.raises(OSError, match="No space"):
        files.replace_directory(tmp_path / "adapter", _fill("new"))
    assert (tmp_path / "adapter" / "inner" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_directory_is_on_disk_before_it_is_swapped_in(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr("os.fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr("os.rename", lambda a, b: (events.append("rename"), rename(a, b)))
    files.replace_directory(tmp_path / "adapter", _fill("new"))
    before = [os.path.basename(event) for event in events[: events.index("rename")]]
    assert before == ["a", "inner", "new"]
    assert events[-1] == str(tmp_path)
