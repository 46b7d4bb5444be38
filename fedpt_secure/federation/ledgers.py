"""Where the simulated clients keep their ledgers: inside the run, or in a directory that outlives runs.

In a directory that outlives runs, a client is found by its id, whatever file its records come from and however many
there are by now: a record more must not begin an empty ledger. That is sound as long as a record stays with one
client. So the directory is bound to how records find their owners, and a run that would deal them otherwise is refused:
a record that moved to another client would get a second budget. Records planted for an audit are nobody's own and
do not count: an audited run is charged to the same ledgers as any other run on the same data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpt_secure import files
from fedpt_secure.config import RunConfig
from fedpt_secure.data import FederatedText, Record
from fedpt_secure.errors import LedgerError
from fedpt_secure.federation.audit_record import load_planted
from fedpt_secure.federation.run_directory import RunDirectory

_BINDING = "ledgers.json"
_SCHEMA = "fedpt-secure/ledgers/1"
_LONGEST_SLUG = 32


def ledger_directories(
    config: RunConfig, text: FederatedText, directory: RunDirectory, *, new: bool
) -> Mapping[str, Path]:
    """Client id -> the directory of its ledger.

    Args:
        new: the run has no checkpoint yet, so that a directory for ledgers may be begun.

    Raises:
        LedgerError: the directory for ledgers is something else, cannot be used, or belongs to records that found their
            owners in another way.
        RunDirectoryError: what was planted into the run is gone or damaged.
    """
    if config.federation.ledgers is None:
        return {client.client_id: directory.client_directory(index) for index, client in enumerate(text.clients)}
    root = Path(config.federation.ledgers)
    _bind(root, _ownership(config, text, directory), new=new)
    return {client.client_id: root / _name(client.client_id) for client in text.clients}


def _name(client_id: str) -> str:
    """Readable, and different for different ids."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", client_id).strip("-")[:_LONGEST_SLUG]
    return f"{slug}-{hashlib.sha256(client_id.encode()).hexdigest()[:16]}".removeprefix("-")


def _ownership(config: RunConfig, text: FederatedText, directory: RunDirectory) -> dict[str, Any]:
    """How records find their owners. Dealt ones have none of their own: then it is the dealing itself."""
    data = config.data
    if data.partition is None:
        return {"schema": _SCHEMA, "owners": "named by the data", "column": data.client_column}
    planted = {Record(item.text).key for item in load_planted(directory).items}
    digest = hashlib.sha256()
    for client in text.clients:
        records = sorted(record.key for record in (*client.train, *client.held_out) if record.key not in planted)
        digest.update(json.dumps([client.client_id, records], ensure_ascii=True).encode() + b"\n")
    return {"schema": _SCHEMA, "owners": "dealt", "clients": data.clients, "dealing": digest.hexdigest()}


def _bind(root: Path, ownership: dict[str, Any], *, new: bool) -> None:
    path = root / _BINDING
    try:
        if new and not path.exists():
            _begin(root, path, ownership)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(
            f"the directory for ledgers {root} cannot be used: {error}",
            hint="restore it: without their ledgers clients cannot know what they have spent",
        ) from error
    if found != ownership:
        raise LedgerError(
            f"the ledgers in {root} are of records that found their owners in another way ({_shown(found)}; here "
            f"{_shown(ownership)}): a record that moves to another client would get a second budget",
            hint="for the same data: the same --client-column, or the same --seed, --clients and --partition; for "
            "other data: another --ledgers",
        )


def _begin(root: Path, path: Path, ownership: dict[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if any(not entry.name.startswith(".") and entry.name != _BINDING for entry in root.iterdir()):
        raise LedgerError(f"{root} holds something else than ledgers", hint="an empty or new directory for --ledgers")
    try:
        files.create_bytes(path, json.dumps(ownership, indent=2).encode() + b"\n", mode=0o600)
    except FileExistsError:
        return  # another run began it meanwhile; whether it is for the same records is looked at next
    files.sync_directory(root)
    files.sync_directory(root.parent)


def _shown(ownership: object) -> str:
    if not isinstance(ownership, dict):
        return "not an object"
    return ", ".join(f"{key} {value}" for key, value in ownership.items() if key != "schema")
