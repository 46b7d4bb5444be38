"""Atomic writes: a reader sees the old file or the new one, never half of one, also after a power cut.

What is being written lies beside its destination as `.NAME.xxxxxxxx.partial`. A process that is killed leaves it there;
`temporaries` finds it and `sweep` removes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SUFFIX = ".partial"


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`: written beside it, flushed to disk, renamed over it.

    Raises:
        OSError: the disk is full or the place not writable; `path` is unchanged and no partial file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as partial:
            partial.write(content)
            partial.flush()
            os.fsync(partial.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def create_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file that is not there yet; its content is on disk when this returns, its name with `sync_directory`.

    Guarantees: `path` is never replaced and never seen half written; of two processes that create it, one does.

    Raises:
        FileExistsError: there is one already.
        OSError: the disk is full, the place not writable, or its file system has no links.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as partial:
            partial.write(content)
            partial.flush()
            os.fsync(partial.fileno())
        os.chmod(name, mode)
        os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, content: str, *, mode: int = 0o644) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode(), mode=mode)


def write_json(path: Path, content: Any, *, mode: int = 0o644) -> None:
    """`write_text` of indented JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", mode=mode)


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the directory `path` by one that `write` fills: written and flushed to disk beside it, then swapped in.

    Guarantees: a crash leaves the old directory, the new one or none at `path`, never a mix; none only between the two
    renames of the swap, because POSIX cannot exchange two directories in one. An exception leaves the old one.

    Args:
        write: given an empty directory to fill.

    Raises:
        OSError: the disk is full or the place not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()  # not `scratch` itself, which only its owner may enter
        write(new)
        _sync_tree(new)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    sync_directory(path.parent)
    shutil.rmtree(scratch, ignore_errors=True)


def temporaries(path: Path) -> list[Path]:
    """What interrupted writes of `path` left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")
    try:
        return sorted(entry for entry in path.parent.iterdir() if name.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sweep(path: Path) -> None:
    """Remove what interrupted writes of `path` left. Assumes that nobody is writing it now."""
    for left in temporaries(path):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            _sync_tree(entry)
        else:
            with entry.open("rb") as content:
                os.fsync(content.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
