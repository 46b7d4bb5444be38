"""A finished run as a report reads it: the files of its directory, checked, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_secure.config import RunConfig
from fedpt_secure.errors import LedgerError, RunDirectoryError
from fedpt_secure.federation import RunDirectory
from fedpt_secure.report.ledgers import LedgerSummary, find_ledgers, summarise_ledger
from fedpt_secure.report.summary import SCHEMA as SUMMARY_SCHEMA

AUDIT_FILE = "audit/audit.json"
AUDIT_SCHEMA = "fedpt-secure/audit/1"
EVALUATION_FILE = "evaluation.json"
EVALUATION_SCHEMA = "fedpt-secure/evaluation/1"
_LOST = "finish the run with `fedpt-secure train --resume`, or restore the file"
ARMS = ("large_base", "small_base", "small_tuned", "proxy_tuned")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One finished run.

    Attributes:
        name: unique among the runs of a report.
        summary, privacy: of `summary.json` and `privacy.json`.
        transcripts, metrics: one mapping per round.
        audit: of `audit/audit.json`; None where the run was not audited.
        evaluation: of `evaluation.json` (`fedpt-secure evaluate`); None where there is none.
        ledgers: of the simulated clients, in the order of their directories.
    """

    name: str
    path: Path
    config: RunConfig
    summary: Mapping[str, Any]
    privacy: Mapping[str, Any]
    transcripts: tuple[Mapping[str, Any], ...]
    metrics: tuple[Mapping[str, Any], ...]
    audit: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    ledgers: tuple[LedgerSummary, ...]

    @property
    def epsilon(self) -> float:
        """What the run was asked for: `inf` where nothing is promised."""
        return math.inf if not self.summary["private"] else self.config.privacy.epsilon

    def source(self, *names: str) -> tuple[str, ...]:
        """Files of this run, as a report names its sources."""
        return tuple(f"{self.name}/{name}" for name in names)


def load_run(path: Path, name: str) -> RunRecord:
    """Read a finished run.

    Raises:
        RunDirectoryError: it is not a run directory, not finished, or a file is damaged or of another version.
    """
    directory = RunDirectory.open(path)
    if not (path / "summary.json").exists():
        raise RunDirectoryError(f"{path} has no summary.json: the run has not finished", hint=_LOST)
    summary = _json(path / "summary.json", SUMMARY_SCHEMA)
    _require_arms(path / "summary.json", summary)
    privacy = _json(path / "privacy.json", None)
    return RunRecord(
        name=name,
        path=path,
        config=directory.config(),
        summary=summary,
        privacy=privacy,
        transcripts=tuple(directory.read_log("transcript")),
        metrics=tuple(directory.read_log("metrics")),
        audit=_optional(path / AUDIT_FILE, AUDIT_SCHEMA),
        evaluation=_optional(path / EVALUATION_FILE, EVALUATION_SCHEMA),
        ledgers=_ledgers(directory),
    )


def find_runs(paths: list[Path]) -> list[tuple[str, Path]]:
    """The runs that were named, and the finished ones inside directories that hold runs, each under a unique name.

    A sweep may hold cells that were refused or are still at work (`unfinished_runs`); a run that is named itself is
    not passed over.

    Raises:
        RunDirectoryError: a path is neither a run nor holds any.
    """
    found: list[Path] = []
    for path in paths:
        inner = list(_runs_in(path))
        if not inner:
            raise RunDirectoryError(
                f"{path} is not a run directory and holds no finished one",
                hint="a directory with config.toml, or a sweep's",
            )
        found += [run for run in inner if run not in found]
    names = _unique_names(found)
    return list(zip(names, found, strict=True))


def unfinished_runs(paths: list[Path]) -> list[str]:
    """Names of runs inside the directories that `find_runs` passes over: refused, interrupted or still at work."""
    return [
        run.name
        for path in paths
        if not (path / "config.toml").is_file()
        for place in (path, path / "cells")
        if place.is_dir()
        for run in sorted(place.iterdir())
        if (run / "config.toml").is_file() and not (run / "summary.json").exists()
    ]


def _runs_in(path: Path) -> Iterator[Path]:
    if (path / "config.toml").is_file():
        yield path
        return
    for place in (path, path / "cells"):
        if place.is_dir():
            yield from sorted(
                entry
                for entry in place.iterdir()
                if (entry / "config.toml").is_file() and (entry / "summary.json").exists()
            )


def _unique_names(paths: list[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{index + 1}-{name}" for index, name in enumerate(names)]


def _ledgers(directory: RunDirectory) -> tuple[LedgerSummary, ...]:
    kept = directory.config().federation.ledgers
    try:
        return tuple(map(summarise_ledger, find_ledgers(directory.path if kept is None else Path(kept))))
    except LedgerError as error:
        raise RunDirectoryError(
            f"the ledgers of {directory.path} cannot be read: {error.message}", hint=error.hint
        ) from error


def _optional(path: Path, schema: str) -> Mapping[str, Any] | None:
    return _json(path, schema) if path.exists() else None


def _json(path: Path, schema: str | None) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}", hint=_LOST) from None
    if not isinstance(content, dict):
        raise RunDirectoryError(f"{path} holds no JSON object", hint=_LOST)
    if schema is not None and content.get("schema") != schema:
        raise RunDirectoryError(
            f"{path} is of schema {content.get('schema')!r}; this version reads {schema!r}",
            hint="use the version that wrote it, or make it again",
        )
    return content


def _require_arms(path: Path, summary: Mapping[str, Any]) -> None:
    """Refuse a summary whose figures a report could not show."""
    try:
        values = [value for arm in ARMS for value in (summary["arms"][arm]["loss"], *summary["arms"][arm]["ci"])]
        values += [summary["improvement"]["loss"], *summary["improvement"]["ci"]]
        sound = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        sound = sound and isinstance(summary["private"], bool)
    except (KeyError, TypeError, IndexError):
        sound = False
    if not sound:
        raise RunDirectoryError(f"{path} lacks a figure or holds one that is no number", hint=_LOST)


def epsilon_name(epsilon: float) -> str:
    """An epsilon as an axis has it."""
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"
