"""The run directory: everything a run leaves behind, and all that resume, generate, audit and report read.

    config.toml        the resolved configuration
    adapter/           the tuned small LM's LoRA, in PEFT's format
    metrics.jsonl      one line per round
    transcript.jsonl   one line per round: sizes, times, dropouts; no content
    privacy.json       the privacy statement
    summary.json       the result
    checkpoint/        state.safetensors, process.json: what resume needs; a directory per run, not per round
    clients/           what each simulated client keeps on its own disk; a real client's stays with the client

Every file but the two logs is replaced atomically; the logs are cut back to the checkpoint on resume.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
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
from fedpt_secure.errors import RunDirectoryError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run after `rounds_done` rounds.

    Attributes:
        run_id: 16 random bytes, drawn once per run.
        data_digest: of the prepared text; resuming on other text is refused.
        model_digest: of the small LM's frozen part.
        tensors: adapter and optimizer state by name.
        scalars: the rest of the optimizer state, and time and work so far.
    """

    run_id: bytes
    rounds_done: int
    data_digest: str
    model_digest: str
    tensors: dict[str, npt.NDArray[Any]]
    scalars: dict[str, Any]


class RunDirectory:
    """Paths and atomic reads and writes of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Start a new run.

        Raises:
            RunDirectoryError: the directory exists and is not empty.
        """
        if path.exists() and any(path.iterdir()):
            raise RunDirectoryError(
                f"{path} is not empty", hint=f"another --out, or `fedpt-secure train --resume {path}` to go on"
            )
        path.mkdir(parents=True, exist_ok=True)
        configuration.save(config, path / "config.toml")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            RunDirectoryError: not a run directory.
        """
        if not (path / "config.toml").is_file():
            raise RunDirectoryError(f"{path} is not a run directory: it has no config.toml", hint="runs lie in runs/")
        return cls(path)

    def config(self) -> RunConfig:
        """The run's configuration."""
        return configuration.load(self.path / "config.toml")

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Args:
            settings: those given for the resumption, nested as in `config.toml`; what is absent is not compared.

        Raises:
            RunDirectoryError: names every differing field.
            ConfigError: a setting is not acceptable at all.
        """
        ours = self.config()
        wanted = configuration.build(RunConfig, _merged(ours.model_dump(), settings))
        if differences := ours.differences(wanted):
            raise RunDirectoryError(
                f"{self.path} was started with other settings (there != here): {'; '.join(differences)}",
                hint="resume without settings, or start a new run",
            )

    @property
    def adapter(self) -> Path:
        """Directory of the tuned adapter."""
        return self.path / "adapter"

    def client_directory(self, index: int) -> Path:
        """Where the simulated client with this index (in sorted id order) keeps its own files."""
        return self.path / "clients" / f"{index:05d}"

    def count_start(self) -> int:
        """Note one more start of a process on this run; returns how many there were before."""
        path = self.path / "checkpoint" / "process.json"
        starts = int(self.read_json(path)["starts"]) if path.exists() else 0
        files.write_json(path, {"starts": starts + 1})
        return starts

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; after this call the round is done."""
        metadata = {
            "run_id": checkpoint.run_id.hex(),
            "rounds_done": str(checkpoint.rounds_done),
            "data_digest": checkpoint.data_digest,
            "model_digest": checkpoint.model_digest,
            "scalars": json.dumps(checkpoint.scalars, allow_nan=False),
        }
        tensors = {name: np.ascontiguousarray(value) for name, value in checkpoint.tensors.items()}
        files.write_bytes(self.path / "checkpoint" / "state.safetensors", save(tensors, metadata=metadata))

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, or None if no round is done yet.

        Raises:
            RunDirectoryError: it is damaged.
        """
        path = self.path / "checkpoint" / "state.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as content:
                metadata = content.metadata()
                return Checkpoint(
                    run_id=bytes.fromhex(metadata["run_id"]),
                    rounds_done=int(metadata["rounds_done"]),
                    data_digest=metadata["data_digest"],
                    model_digest=metadata["model_digest"],
                    tensors={name: content.get_tensor(name) for name in content.keys()},  # noqa: SIM118
                    scalars=json.loads(metadata["scalars"]),
                )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise RunDirectoryError(
                f"the checkpoint {path} is damaged: {error}", hint="start a new run; this one cannot go on"
            ) from None

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Add one line to `metrics` or `transcript`."""
        with (self.path / f"{log}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def read_log(self, log: str) -> list[dict[str, Any]]:
        """All lines of a log.

        Raises:
            RunDirectoryError: a line is damaged.
        """
        path = self.path / f"{log}.jsonl"
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise RunDirectoryError(f"{path} is damaged: {error}") from None

    def cut_logs(self, rounds_done: int) -> None:
        """Drop log lines of rounds that the checkpoint does not know, half-written lines included."""
        for log in ("metrics", "transcript"):
            path = self.path / f"{log}.jsonl"
            if not path.exists():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    round_index = json.loads(line)["round"]
                except (ValueError, KeyError, TypeError):
                    break  # the write that was interrupted; nothing after it can be older
                if round_index < rounds_done:
                    kept.append(line)
            files.write_text(path, "".join(f"{line}\n" for line in kept))

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read one of the run's JSON files.

        Raises:
            RunDirectoryError: missing or damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict):
            raise RunDirectoryError(f"{path} does not hold a JSON object")
        return content


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return merged


def new_run_id() -> bytes:
    """16 random bytes: two runs never share keys, masks or ledger rows."""
    return secrets.token_bytes(16)
