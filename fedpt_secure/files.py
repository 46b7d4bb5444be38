"""Atomic writes: a reader sees the old file or the new one, never half of one, also after a power cut."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`: written beside it, flushed to disk, renamed over it.

    Raises:
        OSError: the disk is full or the place not writable; `path` is unchanged and no partial file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def write_text(path: Path, content: str, *, mode: int = 0o644) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode(), mode=mode)


def write_json(path: Path, content: Any, *, mode: int = 0o644) -> None:
    """`write_text` of indented JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", mode=mode)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
