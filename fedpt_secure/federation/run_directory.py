"""The run directory: everything a run leaves behind, and all that resume, generate, audit and report read.

    config.toml        the resolved configuration; the settled one, once the data's clients are counted
    adapter/           the tuned small LM's LoRA, in PEFT's format
    metrics.jsonl      one line per round
    transcript.jsonl   one line per round: sizes, times, dropouts; no content
    privacy.json       the privacy statement
    summary.json       the result
    evaluation.json    what `evaluate` found later
    checkpoint/        state.safetensors, process.json: what resume needs; a directory per run, not per round
    clients/           what each simulated client keeps on its own disk; a real client's stays with the client
    audit/             planted records and what an audit needs of the run (`audit_record`), and the audit's result; no
                       part of the release
    .lock              held by the process that writes here; the file stays

Everything but the two logs is replaced atomically. A log's line is on disk before the checkpoint that knows its round,
and the logs are cut back to the checkpoint on resume. So a crash costs at most the round it interrupts, and anything
else that is missing or does not fit is damage: `RunDirectoryError`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedpt_secure import config as configuration
from fedpt_secure import files
from fedpt_secure.config import RunConfig
from fedpt_secure.errors import ConfigError, RunDirectoryError

PLANTED = "audit/planted.json"
_LOGS = ("metrics", "transcript")
_REPLACED = (
    "config.toml",
    "metrics.jsonl",
    "transcript.jsonl",
    "privacy.json",
    "summary.json",
    "evaluation.json",
    "adapter",
    "checkpoint/process.json",
    "checkpoint/state.safetensors",
    PLANTED,
)
_LOST = "restore it from a copy, or start a new run; this one cannot go on"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run after `rounds_done` rounds.

    Attributes:
        run_id: 16 random bytes, drawn once per run.
        data_digest: of the prepared text; resuming on other text is refused.
        model_digest: of the small LM's frozen part.
        config_toml: the settled configuration that the rounds so far were trained with.
        tensors: `adapter`, `first_moment`, `second_moment`, `seen`, `average`, each float [d].
        scalars: `optimizer_steps`, `seconds` by phase so far, and the next round's `clip_norm`.
    """

    run_id: bytes
    rounds_done: int
    data_digest: str
    model_digest: str
    config_toml: str
    tensors: dict[str, npt.NDArray[Any]]
    scalars: dict[str, Any]


class RunDirectory:
    """Paths and atomic reads and writes of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: weakref.finalize[Any, Any] | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Start a new run. A start that never reached its first checkpoint is taken over.

        The directory is locked from here on, until `locked` ends or the object is gone: of two processes that ask for
        the same directory, one gets it.

        Raises:
            RunDirectoryError: the directory holds anything else, or is in use by another process.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not (path / ".lock").exists():  # else not before it is ours: somebody may be at work there
                _require_free(path)
        directory = cls(path)
        claim = directory._lock()
        try:
            _require_free(path)  # again: the lock's last holder may have made a run of it meanwhile
            for name in _REPLACED:
                files.sweep(path / name)
            (path / "checkpoint" / "process.json").unlink(missing_ok=True)
            (path / PLANTED).unlink(missing_ok=True)
            directory.save_config(config)
        except BaseException:
            claim()
            raise
        directory._claim = claim
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run, and remove the temporaries that a killed process left.

        They stay where the directory is in use, for then they may be about to be renamed, or may not be written to.

        Raises:
            RunDirectoryError: not a run directory.
        """
        if not (path / "config.toml").is_file():
            raise RunDirectoryError(f"{path} is not a run directory: it has no config.toml", hint="runs lie in runs/")
        directory = cls(path)
        if any(files.temporaries(path / name) for name in _REPLACED):
            with suppress(RunDirectoryError), directory.locked():
                for name in _REPLACED:
                    files.sweep(path / name)
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here. Ends with the process too, however it ends. Not reentrant.

        Raises:
            RunDirectoryError: in use by another process, or not lockable.
        """
        release = self._claim or self._lock()
        self._claim = None
        try:
            yield
        finally:
            release()

    def _lock(self) -> weakref.finalize[Any, Any]:
        """Take the lock; calling the result gives it back, as does the end of this object."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"cannot lock {self.path}: {error}", hint="runs need a writable place") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise RunDirectoryError(
                    f"{self.path} is in use by another process", hint="wait for it to end, or another --out"
                ) from None
            raise RunDirectoryError(
                f"cannot lock {self.path}: {error}", hint="runs need a file system that has locks"
            ) from None
        return weakref.finalize(self, os.close, descriptor)

    def config(self) -> RunConfig:
        """The run's configuration."""
        return configuration.load(self.path / "config.toml")

    def save_config(self, config: RunConfig) -> None:
        """Replace the configuration, when what depends on the data is settled."""
        configuration.save(config, self.path / "config.toml")

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Args:
            settings: those given for the resumption, nested as in `config.toml`; what is absent is not compared.

        Raises:
            RunDirectoryError: names every differing field.
            ConfigError: a setting is not acceptable at all.
        """
        ours = self.config()
        wanted = configuration.build(RunConfig, configuration.overlay(ours.model_dump(), settings))
        if differences := ours.differences(wanted):
            raise RunDirectoryError(
                f"{self.path} was started with other settings (there != here): {'; '.join(differences)}",
                hint="resume without settings, or start a new run",
            )

    @property
    def adapter(self) -> Path:
        """Directory of the tuned adapter."""
        return self.path / "adapter"

    def replace_adapter(self, write: Callable[[Path], None], *, readme: str) -> None:
        """Replace the adapter as a whole.

        A crash leaves the old one, the new one, or between two renames none; never a mix.

        Args:
            write: fills the empty directory it is given.
            readme: content of `README.md`, in place of one that `write` may make.
        """

        def fill(directory: Path) -> None:
            write(directory)
            files.write_text(directory / "README.md", readme)

        files.replace_directory(self.adapter, fill)

    def client_directory(self, index: int) -> Path:
        """Where the simulated client with this index (in sorted id order) keeps its own files."""
        return self.path / "clients" / f"{index:05d}"

    def count_start(self) -> int:
        """Note one more start of a process on this run; returns how many there were before.

        Raises:
            RunDirectoryError: the count is damaged.
        """
        path = self.path / "checkpoint" / "process.json"
        starts: Any = self.read_json(path).get("starts") if path.exists() else 0
        if not _is_count(starts):
            raise RunDirectoryError(f"{path} is damaged: starts is {starts!r}, not a count", hint=_LOST)
        files.write_json(path, {"starts": starts + 1})
        return int(starts)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; after this call the round is done."""
        metadata = {
            "run_id": checkpoint.run_id.hex(),
            "rounds_done": str(checkpoint.rounds_done),
            "data_digest": checkpoint.data_digest,
            "model_digest": checkpoint.model_digest,
            "config_toml": checkpoint.config_toml,
            "scalars": json.dumps(checkpoint.scalars, allow_nan=False),
        }
        tensors = {name: np.ascontiguousarray(value) for name, value in checkpoint.tensors.items()}
        files.write_bytes(self.path / "checkpoint" / "state.safetensors", save(tensors, metadata=metadata))

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, or None if no round is done yet.

        Raises:
            RunDirectoryError: it is damaged: unreadable, or not all of a `Checkpoint`.
        """
        path = self.path / "checkpoint" / "state.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as content:
                metadata = content.metadata() or {}
                checkpoint = Checkpoint(
                    run_id=bytes.fromhex(metadata["run_id"]),
                    rounds_done=int(metadata["rounds_done"]),
                    data_digest=metadata["data_digest"],
                    model_digest=metadata["model_digest"],
                    config_toml=metadata["config_toml"],
                    tensors={name: content.get_tensor(name) for name in content.keys()},  # noqa: SIM118
                    scalars=json.loads(metadata["scalars"]),
                )
            _require_whole(checkpoint)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise RunDirectoryError(f"the checkpoint {path} is damaged: {what}", hint=_LOST) from None
        return checkpoint

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Add one line to `metrics` or `transcript`. It is on disk when this returns.

        A checkpoint written afterwards never knows a round that the logs do not, also after a power cut.
        """
        path = self.path / f"{log}.jsonl"
        content = json.dumps(line, allow_nan=False) + "\n"
        is_new = not path.exists()
        with path.open("ab") as stream:
            stream.write(content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            files.sync_directory(self.path)

    def read_log(self, log: str) -> list[dict[str, Any]]:
        """All lines of a log, one for each round from 0 on; none where no round is done yet.

        Raises:
            RunDirectoryError: a line is damaged or out of its place.
        """
        path = self.path / f"{log}.jsonl"
        lines = []
        for index, content in enumerate(_lines(path)):
            try:
                lines.append(_log_line(content, index))
            except ValueError as error:
                raise RunDirectoryError(
                    f"{path} is damaged: line {index + 1}: {error}", hint="`fedpt-secure train --resume` mends a crash"
                ) from None
        return lines

    def cut_logs(self, rounds_done: int) -> None:
        """Drop what a crash left behind the checkpoint: lines of rounds it does not know, and a half-written last line.

        Guarantees: afterwards each log holds exactly the rounds 0 .. rounds_done - 1, in order.

        Raises:
            RunDirectoryError: a log lacks a round, or is damaged where no crash damages it. Neither log is touched.
        """
        kept = {path: self._lines_up_to(path, rounds_done) for path in (self.path / f"{log}.jsonl" for log in _LOGS)}
        for path, content in kept.items():
            if path.exists() and path.read_bytes() != content:
                files.write_bytes(path, content)

    def _lines_up_to(self, path: Path, rounds_done: int) -> bytes:
        lines = _lines(path)
        for index, content in enumerate(lines):
            try:
                _log_line(content, index)
            except ValueError as error:
                if index >= rounds_done and index == len(lines) - 1:
                    break  # the write that was interrupted
                raise RunDirectoryError(f"{path} is damaged: line {index + 1}: {error}", hint=_LOST) from None
        if len(lines) < rounds_done:
            raise RunDirectoryError(
                f"{path} is damaged: it holds {len(lines)} rounds and the checkpoint {rounds_done}", hint=_LOST
            )
        return b"".join(content + b"\n" for content in lines[:rounds_done])

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read one of the run's JSON files.

        Raises:
            RunDirectoryError: missing or damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunDirectoryError(f"cannot read {path}: {error}", hint=_LOST) from None
        if not isinstance(content, dict):
            raise RunDirectoryError(f"{path} does not hold a JSON object", hint=_LOST)
        return content


def _require_free(path: Path) -> None:
    """Refuse a directory that holds more than a start leaves that never reached its first checkpoint."""
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory", hint="another --out")
    ours = {path / ".lock", path / "checkpoint" / "process.json", path / PLANTED}
    ours.update(left for name in _REPLACED for left in files.temporaries(path / name))
    ours.update(log for log in (path / f"{name}.jsonl" for name in _LOGS) if log.is_file() and not log.stat().st_size)
    with suppress(RunDirectoryError, ConfigError):  # somebody else's config.toml is not ours to replace
        configuration.load(path / "config.toml")
        ours.add(path / "config.toml")
    found = set(path.iterdir())
    for folder in (path / "checkpoint", path / "audit"):
        if folder.is_dir() and not folder.is_symlink():
            found = found - {folder} | set(folder.iterdir())
    if any(entry not in ours or entry.is_symlink() for entry in found):
        raise RunDirectoryError(
            f"{path} is not empty", hint=f"another --out, or `fedpt-secure train --resume {path}` to go on"
        )


def _require_whole(checkpoint: Checkpoint) -> None:
    """Raises KeyError or ValueError where a checkpoint lacks what resuming needs."""
    if len(checkpoint.run_id) != 16 or checkpoint.rounds_done < 0:
        raise ValueError(f"run id {checkpoint.run_id.hex()!r} or round count {checkpoint.rounds_done} cannot be")
    vectors = [checkpoint.tensors[name] for name in ("adapter", "first_moment", "second_moment", "seen", "average")]
    if any(v.ndim != 1 or v.shape != vectors[0].shape or v.dtype.kind != "f" for v in vectors):
        raise ValueError("adapter and moments are not float vectors of one length")
    if not isinstance(checkpoint.scalars, dict):
        raise ValueError("scalars are not an object")
    if not _is_count(checkpoint.scalars["optimizer_steps"]):
        raise ValueError(f"optimizer_steps is {checkpoint.scalars['optimizer_steps']!r}, not a count")
    seconds = checkpoint.scalars["seconds"]
    if not isinstance(seconds, dict) or not all(type(s) in (int, float) and math.isfinite(s) for s in seconds.values()):
        raise ValueError(f"seconds are {seconds!r}, not numbers by phase")
    clip_norm = checkpoint.scalars["clip_norm"]
    if not (type(clip_norm) in (int, float) and 0 < clip_norm < math.inf):
        raise ValueError(f"clip_norm is {clip_norm!r}, not a number above 0")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # not isinstance: True is no count


def _lines(path: Path) -> list[bytes]:
    """A log's lines, the last one perhaps cut short; none where there is no log.

    Raises:
        RunDirectoryError: there is something, and it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error}", hint=_LOST) from None
    return lines if lines[-1] else lines[:-1]


def _log_line(content: bytes, index: int) -> dict[str, Any]:
    """Raises ValueError where a line is not the JSON object of round `index`."""
    try:
        line = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    if not _is_count(line.get("round")):
        raise ValueError(f"round is {line.get('round')!r}, not a count")
    if line["round"] != index:
        raise ValueError(f"round {line['round']} in the place of round {index}")
    return line


def new_run_id() -> bytes:
    """16 random bytes: two runs never share keys, masks or ledger rows."""
    return secrets.token_bytes(16)
