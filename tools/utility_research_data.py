"""Tasks of the utility research: records as `fedpt-secure train` prepares them, as flat arrays of token ids.

`choice` is a slice of the *training* records that is kept out of training: early stopping and every curve over time
read it, and never the evaluation records, which are looked at once per configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpt_secure.config import DataConfig
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.examples import Example, encode
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.lm.small import builtin_directory
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.progress import SILENT

CONTEXT = 128
CHOICE_RECORDS = 100
SPLITS = ("train", "choice", "evaluation")


@dataclass(frozen=True)
class Task:
    """One data set, cut and split; ids are the large model's."""

    name: str
    train: tuple[Example, ...]
    choice: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    clients: int

    def split(self, name: str) -> tuple[Example, ...]:
        """One of `SPLITS`."""
        examples: tuple[Example, ...] = getattr(self, name)
        return examples

    def save(self, path: Path) -> None:
        """Write one compressed npz file."""
        arrays: dict[str, np.ndarray] = {"clients": np.array(self.clients)}
        for name in SPLITS:
            examples = self.split(name)
            arrays[f"{name}_ids"] = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in examples])
            arrays[f"{name}_lengths"] = np.array([len(e.ids) for e in examples], dtype=np.uint16)
            arrays[f"{name}_loss_from"] = np.array([e.loss_from for e in examples], dtype=np.uint16)
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            splits = {}
            for name in SPLITS:
                borders = np.cumsum(arrays[f"{name}_lengths"].astype(np.int64))[:-1]
                pieces = np.split(arrays[f"{name}_ids"].astype(np.int64), borders)
                starts = arrays[f"{name}_loss_from"]
                splits[name] = tuple(
                    Example(tuple(ids.tolist()), int(start)) for ids, start in zip(pieces, starts, strict=True)
                )
            return cls(path.stem, clients=int(arrays["clients"]), **splits)


def data_config(name: str, data: Path) -> DataConfig:
    """The settings of `fedpt-secure train` for one of the research data sets; files lie in the folder `data`."""
    pairs = {
        "medquad": {"prompt_column": "question", "response_column": "answer", "client_column": "client"},
        "dolly": {"prompt_column": "instruction", "response_column": "response", "client_column": "client"},
        "gsm8k": {
            "prompt_column": "question", "response_column": "answer", "clients": 10, "partition": "equal",
        },
    }  # fmt: skip
    if name in pairs:
        file = data / ("gsm8k_train.jsonl" if name == "gsm8k" else f"{name}.jsonl")
        return DataConfig.model_validate({"source": str(file), **pairs[name]})
    return DataConfig(source="chitchat" if name == "chat" else name)


def builtin_tokenizer() -> TextTokenizer:
    """The large model's tokenizer, as the built-in proxy ships it."""
    backend = load_tokenizer(builtin_directory() / "tokenizer.json")
    return TextTokenizer(backend, separator_id=Vocabulary.from_tokenizer(backend).separator_id)


def prepare(name: str, data: Path, *, seed: int, evaluation_records: int) -> Task:
    """Load, split and encode a data set with the code and the seed of a run.

    With as many `evaluation_records` as a run's `evaluation.records` they are the very records that a run reports on;
    a choice slice is cut from the training records.
    """
    text = load_federated_text(data_config(name, data), seed=seed, cache=Cache(), progress=SILENT)
    tokenizer = builtin_tokenizer()
    train = [encode(record, tokenizer, context_length=CONTEXT) for client in text.clients for record in client.train]
    held_out = [record for client in text.clients for record in client.held_out]
    chosen = simulation_rng("evaluation sample", seed).permutation(len(held_out))[:evaluation_records]
    order = simulation_rng("utility research choice", seed).permutation(len(train))
    return Task(
        name,
        train=tuple(train[i] for i in sorted(order[CHOICE_RECORDS:])),
        choice=tuple(train[i] for i in sorted(order[:CHOICE_RECORDS])),
        evaluation=tuple(encode(held_out[i], tokenizer, context_length=CONTEXT) for i in sorted(chosen)),
        clients=len(text.clients),
    )


def judged_tokens(examples: Sequence[Example]) -> np.ndarray:
    """How many tokens of each example are predicted with loss, int64 `[examples]`."""
    return np.array([len(example.ids) - example.loss_from for example in examples], dtype=np.int64)
