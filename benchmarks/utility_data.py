"""The data sets of the utility benchmark: how each is read, and which records are trained on and judged.

Records are those of `fedpt-secure train` on the same settings and seed: the same split, the same cut, the same seeded
sample of held-out records. `medquad`, `dolly` and `gsm8k` are JSON lines that the user brings (`docs/results.md`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_secure.config import DataConfig, build, overlay
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.examples import Example, encode
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.progress import SILENT

CONTEXT = 128
NAMES = ("chat", "medquad", "dolly", "sotu", "gsm8k")
_FILES = {"medquad": "medquad.jsonl", "dolly": "dolly.jsonl", "gsm8k": "gsm8k_train.jsonl"}
_COLUMNS: dict[str, dict[str, Any]] = {
    "medquad": {"prompt_column": "question", "response_column": "answer", "client_column": "client"},
    "dolly": {"prompt_column": "instruction", "response_column": "response", "client_column": "client"},
    "gsm8k": {"prompt_column": "question", "response_column": "answer", "clients": 10, "partition": "equal"},
}


@dataclass(frozen=True)
class Records:
    """A data set as both sides of the comparison see it.

    Attributes:
        train: all clients' training records, client by client; ids of the large model.
        evaluation: the held-out records that are judged.
        clients: how many there are.
        digest: SHA-256 over the ids of both.
    """

    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    clients: int
    digest: str


def data_settings(name: str, folder: Path) -> dict[str, Any]:
    """The `[data]` settings of a run on one of `NAMES`.

    Raises:
        DataError: the file is not in the folder.
    """
    if name not in _FILES:
        return {"source": "chitchat" if name == "chat" else name}
    path = folder / _FILES[name]
    if not path.is_file():
        raise DataError(
            f"{path} is missing", hint="--data-folder FOLDER; docs/results.md says where the files come from"
        )
    return {"source": str(path), **_COLUMNS[name]}


def changed_by(settings: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """Settings with what the command line's `--set SECTION.KEY=VALUE` changes.

    Raises:
        ConfigError: a line is not TOML.
    """
    changed = dict(settings)
    for line in lines:
        try:
            changed = overlay(changed, tomllib.loads(line))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"--set {line!r} is not TOML: {error}", hint="--set privacy.clip_norm=0.2") from None
    return changed


def load_records(
    settings: Mapping[str, Any],
    tokenizer: TextTokenizer,
    *,
    seed: int,
    evaluation_records: int,
    context_length: int = CONTEXT,
) -> Records:
    """The records of a run with these `[data]` settings, this seed and this `evaluation.records`."""
    text = load_federated_text(build(DataConfig, settings), seed=seed, cache=Cache(), progress=SILENT)
    length = {"context_length": context_length}
    train = [encode(record, tokenizer, **length) for client in text.clients for record in client.train]
    held_out = [record for client in text.clients for record in client.held_out]
    chosen = sorted(simulation_rng("evaluation sample", seed).permutation(len(held_out))[:evaluation_records])
    evaluation = [encode(held_out[index], tokenizer, **length) for index in chosen]
    return Records(tuple(train), tuple(evaluation), len(text.clients), _digest(train, evaluation))


def _digest(*parts: Sequence[Example]) -> str:
    content = json.dumps([[[example.ids, example.loss_from] for example in part] for part in parts])
    return hashlib.sha256(content.encode()).hexdigest()
