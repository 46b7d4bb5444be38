"""What a client's folder must not forget: the run it belongs to, and how far its ledger has come.

The first run that asks binds the folder, for good. A ledger that was put back from a backup has forgotten releases and
opened rounds, and a server could ask for them a second time; its number of entries tells.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import LedgerError, RoundError, RunDirectoryError

_SCHEMA = "fedpt-secure/joined/1"
_MARK = "fedpt-secure/ledger-mark/1"


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
            hint="a second run on the same records: a new folder, into which this ledger is moved, never copied",
        )


def mark_ledger(path: Path, entries: int) -> None:
    """Remember how many entries the ledger has.

    Raises:
        OSError: it cannot be written.
    """
    files.write_json(path, {"schema": _MARK, "entries": entries}, mode=0o600)


def require_not_older(path: Path, entries: int) -> None:
    """Refuse a ledger with fewer entries than it had.

    Raises:
        LedgerError: it is an older copy, or the mark is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _MARK or type(content["entries"]) is not int:
            raise ValueError(f"{content!r}")
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(f"{path} is damaged: {error}", hint="restore it beside the ledger that it is about") from None
    if entries < content["entries"]:
        raise LedgerError(
            f"the ledger has {entries} entries and had {content['entries']}: it is an older copy, which has forgotten "
            "what was released since",
            hint="restore the newest ledger; without it these records must not be used again",
        )
