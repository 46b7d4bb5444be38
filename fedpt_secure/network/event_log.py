"""Structured logs: one JSON object a line. Only events of known fields are written, so that no secret can slip in."""

from __future__ import annotations

import datetime
import errno
import json
import os
import threading
from pathlib import Path

FIELDS = frozenset(
    {"round", "phase", "client", "outcome", "size", "seconds", "code", "clients", "rounds", "why", "pid", "survivors"}
)
"""Names that a line may have. `why` is the sentence of an error of our own, which quotes no record, or the class of any
other exception; a client's tells what it has spent of its budget, and stays in its folder."""
_LARGEST = 16 << 20


class EventLog:
    """Appends events to a file of its owner's only. A file that has grown large is kept once, as `NAME.1`.

    The log is for people: a full disk stops what must be counted, in the ledger, and not what is only told. The next
    line that can be written says how many could not.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._missed = 0

    def write(self, event: str, **fields: str | float | int | None) -> None:
        """Add a line.

        Raises:
            ValueError: a field's name is not one of `FIELDS`.
        """
        if unknown := set(fields) - FIELDS:
            raise ValueError(f"a log line has no field {sorted(unknown)[0]!r}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        shown = {key: _shown(value) for key, value in fields.items()}
        with self._turn:
            missed = {"lines_missed": self._missed} if self._missed else {}
            try:
                self._append(json.dumps({"time": now, "event": event} | shown | missed) + "\n")
                self._missed = 0
            except OSError:
                self._missed += 1

    def _append(self, line: str) -> None:
        if self._path.exists() and self._path.stat().st_size > _LARGEST:
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            before, content = os.fstat(descriptor).st_size, line.encode()
            if os.write(descriptor, content) < len(content):
                os.ftruncate(descriptor, before)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def _shown(value: str | float | int | None) -> str | float | int | None:
    return round(value, 6) if isinstance(value, float) else value
