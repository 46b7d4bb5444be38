"""`status.json`: what a server or a client is doing, for whoever watches. Replaced whole, read strictly."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fedpt_secure import files
from fedpt_secure.crypto.structs import resolved
from fedpt_secure.errors import RunDirectoryError

State = Literal["starting", "gathering", "round", "idle", "stopped", "done", "failed"]
SECONDS_BETWEEN_WRITES = 0.5
_LARGEST = 64 << 20
_Count = Annotated[int, msgspec.Meta(ge=0)]


@resolved
class ClientLine(msgspec.Struct, forbid_unknown_fields=True):
    """A client as the server sees it.

    Attributes:
        outcome: of the last phase it was asked in.
        dropped: rounds of this run that it dropped out of.
        rounds: whose sums it is in.
        epsilon: an upper bound of what this run has cost it so far, in the run's unit and at its delta; None without
            privacy. What its ledger says of all runs, only its owner knows.
    """

    reachable: bool = False
    phase: str = ""
    outcome: str = ""
    dropped: _Count = 0
    rounds: _Count = 0
    epsilon: float | None = None
    seen: str = ""


@resolved
class Status(msgspec.Struct, forbid_unknown_fields=True):
    """What a process is doing.

    Attributes:
        role: whose folder it is.
        pid: of the process that wrote it; a killed one does not say so itself.
        claim: the privacy statement in words, as far as it goes.
        why: of a failure, or of the last aborted round.
    """

    role: Literal["server", "client"]
    pid: int
    state: State = "starting"
    round_index: _Count = 0
    rounds: _Count = 0
    aborted: _Count = 0
    phase: str = ""
    why: str = ""
    claim: str = ""
    updated: str = ""
    clients: dict[str, ClientLine] = {}


class StatusFile:
    """Writes a status as it changes, no more often than needed.

    Args:
        path: of `status.json`.
        status: the first one.
    """

    def __init__(self, path: Path, status: Status) -> None:
        self._path, self._written = path, 0.0
        self.status = status
        self.write(now=True)

    def write(self, *, now: bool = False) -> None:
        """Put the status on disk; at once, or if the last write is long enough ago."""
        if not now and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        self.status.updated = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with contextlib.suppress(OSError):  # it is for people; what must be counted stops where it is counted
            files.write_bytes(self._path, msgspec.json.encode(self.status), mode=0o600)
        self._written = time.monotonic()


def new_status(role: Literal["server", "client"], clients: Mapping[str, ClientLine] | None = None) -> Status:
    """The status of this process as it starts."""
    return Status(role, os.getpid(), clients=dict(clients or {}))


def read_status(path: Path) -> Status:
    """What is on disk.

    Raises:
        RunDirectoryError: missing, or not a status.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise RunDirectoryError(f"{path} is larger than any status")
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be read: {error.strerror or error}", hint="has it been started yet?"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is not a status: {error}") from None


def is_running(status: Status) -> bool:
    """Whether the process that wrote it is alive, as far as this machine can tell."""
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
