"""Which run a client's folder belongs to: bound by the first run that asks, for good."""

from __future__ import annotations

import json
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import RoundError, RunDirectoryError

_SCHEMA = "fedpt-secure/joined/1"


def joined_run(path: Path) -> bytes | None:
    """The run's id, or None where none has asked yet.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        run_id = bytes.fromhex(content["run_id"])
        if len(run_id) != 16:
            raise ValueError(f"a run id of {len(run_id)} bytes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunDirectoryError(
            f"{path} is damaged: {error}", hint="restore it; without it this client would join a second run"
        ) from None
    return run_id


def join_run(path: Path, run_id: bytes) -> None:
    """Bind the folder to a run; the same run again changes nothing.

    Raises:
        RoundError: it is bound to another one.
    """
    before = joined_run(path)
    if before is None:
        content = json.dumps({"schema": _SCHEMA, "run_id": run_id.hex()}, indent=2).encode() + b"\n"
        try:
            files.create_bytes(path, content, mode=0o600)
            files.sync_directory(path.parent)
        except FileExistsError:
            before = joined_run(path)
        else:
            return
    if before != run_id:
        raise RoundError(
            "the server asks for another run than the one this folder belongs to",
            hint="a second run on the same records: a new folder with its config.toml and roster, and this ledger",
        )
