"""Partial results of an audit, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedpt_secure import __version__, files
from fedpt_secure.attacks.findings import Finding

_SCHEMA = "fedpt-secure/audit-part/1"


class PartStore:
    """One file a part under `audit/parts/`, valid for one subject, one version and one set of settings.

    What does not fit is computed again and replaced; a damaged file too, for it holds nothing that cannot be had again.
    """

    def __init__(self, directory: Path, *, key: dict[str, Any], fresh: bool) -> None:
        self._directory = directory
        content = json.dumps({"schema": _SCHEMA, "version": __version__, **key}, sort_keys=True)
        self._key = hashlib.sha256(content.encode()).hexdigest()
        self._fresh = fresh

    def load(self, part: str) -> Finding | None:
        """An earlier result of this part, if it is of the same audit."""
        path = self._path(part)
        if self._fresh or not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != self._key:
                return None
            return Finding.from_json(content["finding"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def save(self, part: str, finding: Finding) -> None:
        """Keep a part's result."""
        files.write_json(self._path(part), {"key": self._key, "finding": finding.to_json()})

    def _path(self, part: str) -> Path:
        return self._directory / f"{part}.json"
