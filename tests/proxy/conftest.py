"""A tiny large model on disk, and a tiny small model with a LoRA adapter that was really changed."""

from __future__ import annotations

import shutil
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.local_transformers import LocalTransformersLM

SHIPPED = Path(str(resources.files("fedpt_secure.lm.builtin"))) / "tokenizer.json"


def llama(seed: int, *, vocab_size: int, **changes) -> LlamaForCausalLM:
    """A random model with clear preferences: its logits have a standard deviation of about 3."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(settings | changes))).eval()


@pytest.fixture(scope="session")
def large_directory(tmp_path_factory) -> Path:
    """A tiny Llama over the shipped tokenizer's 49,152 tokens, its output layer padded to 49,160."""
    path = tmp_path_factory.mktemp("large")
    llama(1, vocab_size=49_160).save_pretrained(path)
    shutil.copy(SHIPPED, path / "tokenizer.json")
    return path


@pytest.fixture(scope="session")
def large(large_directory) -> LocalTransformersLM:
    return LocalTransformersLM(large_directory, torch.device("cpu"))


def tuned_model(vocab_size: int):
    """A LoRA model as a run makes it: A frozen, B trainable, B not zero."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT 0.21 reads a name that Transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(llama(2, vocab_size=vocab_size), config).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return model


@pytest.fixture
def pair() -> AdapterPair:
    """600 small classes, the last but one unknown; the small model's output layer is padded to 608."""
    table = np.random.default_rng(0).permutation(49_152)[:600]
    table[598] = -1
    return AdapterPair(tuned_model(608), TokenMap(table, 49_152))
