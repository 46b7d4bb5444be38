"""A miniature world for whole runs: two tiny language models over the shipped tokenizer, and text with owners."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests fork; a process that has run OpenMP on several threads must not."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a tiny `large` and `small` causal LM in Transformers format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpt_secure.lm.base import builtin_directory

    directories = {}
    for seed, name in enumerate(("large", "small")):
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp(name)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
        shutil.copy(builtin_directory() / "tokenizer.json", directory / "tokenizer.json")
        directories[name] = str(directory)
    return directories


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 6 clients with 12 distinct records each."""
    simulation_rng = random.Random(5)
    words = [
        "hey",
        "lol",
        "nice",
        "day",
        "today",
        "work",
        "home",
        "game",
        "tomorrow",
        "maybe",
        "pizza",
        "movie",
        "sleep",
        "fine",
        "thanks",
        "really",
        "good",
    ]
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for client in range(6):
            for record in range(12):
                text = " ".join(simulation_rng.choices(words, k=8)) + f" {record}"
                stream.write(json.dumps({"who": f"person {client}", "said": text}) + "\n")
    return path
