"""Do the constants that a run calls public depend on private text? Alpha above all: choosing it by private text costs
privacy that no accountant counts.

Asked of the installed build: two miniature runs with the audited run's settings of privacy, steering and training, over
two invented data sets that have no record in common. Every setting that comes out must be the one that went in. And of
the audited run: its settings must be those its clients agreed to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.attacks.subject import Subject
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.progress import SILENT, Progress

_WORLDS = (("tide", "harbour", "rope", "gull"), ("ledger", "invoice", "stamp", "desk"))
_CLIENTS, _RECORDS = 3, 15


def compare_public_constants(subject: Subject, progress: Progress) -> dict[str, Any]:
    """`compared`: names of the settings; `differences`: one sentence for every one that did not stay what it was."""
    checkpoint = subject.directory.load_checkpoint()
    if checkpoint is None:
        raise RunDirectoryError(f"{subject.directory.path} has lost its checkpoint")
    agreed = build(RunConfig, tomllib.loads(checkpoint.config_toml))
    differences = [f"the run's settings are not those agreed: {line}" for line in agreed.differences(subject.config)]
    compared = [
        *_flat(subject.config.proxy.model_dump(), "proxy."),
        *_flat(subject.config.training.model_dump(), "training."),
    ]
    with tempfile.TemporaryDirectory() as place, progress.task("public constants", len(_WORLDS), unit="runs") as task:
        model = _tiny_model(Path(place) / "model", subject.config.seed)
        for number, words in enumerate(_WORLDS):
            wanted = _miniature(subject.config, Path(place) / f"world{number}.jsonl", words, model)
            directory = RunDirectory.create(Path(place) / f"run{number}", wanted)
            result = run_training(wanted, directory, cache=Cache(Path(place) / "cache"), progress=SILENT)
            settled = wanted.for_population(_CLIENTS)
            for found in (result.config, directory.config()):
                differences += [f"in a run over invented data: {line}" for line in settled.differences(found)]
            task.advance()
    return {"compared": compared, "differences": sorted(set(differences))}


def _miniature(config: RunConfig, data: Path, words: tuple[str, ...], model: Path) -> RunConfig:
    lines = [
        {
            "who": f"person {client}",
            "said": " ".join(words[(client + record + step) % len(words)] for step in range(3)) + f" {client} {record}",
        }
        for client in range(_CLIENTS)
        for record in range(_RECORDS)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return build(
        RunConfig,
        {
            "data": {"source": str(data), "client_column": "who", "text_column": "said"},
            "models": {"small": str(model), "large": str(model), "device": "cpu", "context_length": 12},
            "lora": {"rank": 2},
            "privacy": {"epsilon": 4.0, "clip_norm": config.privacy.clip_norm},
            "federation": {"rounds": 1, "cohort": _CLIENTS},
            "training": config.training.model_dump() | {"local_steps": 1},
            "proxy": config.proxy.model_dump() | {"distill_steps": 0},
            "evaluation": {"records": 10, "bootstrap_samples": 200},
        },
    )


def _tiny_model(directory: Path, seed: int) -> Path:
    """A random causal LM over the built-in proxy's tokenizer, small enough to train in a second."""
    tokenizer = builtin_directory() / "tokenizer.json"
    vocabulary = Vocabulary.from_file(tokenizer).size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
    shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


def _flat(values: dict[str, Any], prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in values]
