"""A pretrained small LM: the built-in one, or any of the large model's tokenizer family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.compact_weights import expanded
from fedpt_secure.lm.directions import FILE as DIRECTIONS_FILE
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary

BUILTIN = "builtin"


@dataclass(frozen=True, slots=True)
class BaseLM:
    """A pretrained small LM before any adapter, and how its vocabulary sits in the large one."""

    model: PreTrainedModel
    token_map: TokenMap
    name: str
    directions: Directions | None = None
    """Public directions for LoRA's A, where the small LM ships them."""


def builtin_directory() -> Path:
    """Where the built-in proxy's files lie."""
    return Path(str(resources.files("fedpt_secure.lm.builtin")))


def load_base(spec: str, large_vocabulary: Vocabulary) -> BaseLM:
    """Load the built-in proxy, or any Transformers causal LM of the large model's tokenizer family.

    Raises:
        ModelError: files missing, corrupt, or of another tokenizer (the first differing tokens are named).
    """
    return _load_builtin(large_vocabulary) if spec == BUILTIN else _load_transformers(spec, large_vocabulary)


def _load_builtin(large_vocabulary: Vocabulary) -> BaseLM:
    directory = builtin_directory()
    expected = Vocabulary.from_file(directory / "tokenizer.json")
    # Raises where the large model's tokens are not the ones the proxy's map was made for.
    order = TokenMap.between(expected, large_vocabulary).small_to_large
    model, token_map = load_builtin_weights(directory, large_vocabulary)
    made_for = token_map.small_to_large
    # The same tokens under other ids: the map leads to where they are in this large model.
    token_map = TokenMap(np.where(made_for < 0, made_for, order[made_for]), large_vocabulary_size=large_vocabulary.size)
    return BaseLM(model, token_map, BUILTIN, Directions.load(directory / DIRECTIONS_FILE))


def load_builtin_weights(directory: Path, large_vocabulary: Vocabulary) -> tuple[LlamaForCausalLM, TokenMap]:
    """The built-in proxy's model (float32) and token map, without LoRA directions.

    Raises:
        ModelError: a file is missing or damaged.
    """
    try:
        config = LlamaConfig.from_pretrained(directory)
        config.dtype = torch.float32  # the files hold fewer bits
        model = LlamaForCausalLM(config)
        missing, unexpected = _fill(model, load_file(directory / "model.safetensors"))
        content = json.loads((directory / "small_to_large.json").read_text(encoding="utf-8"))
        small_to_large = np.asarray(content, dtype=np.int64)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"the built-in proxy is damaged: {error}", hint="reinstall fedpt-secure") from None
    if missing or unexpected:
        raise ModelError(
            f"the built-in proxy is damaged: missing {sorted(missing)}, unexpected {sorted(unexpected)}",
            hint="reinstall fedpt-secure",
        )
    model.tie_weights()
    return model, TokenMap(small_to_large, large_vocabulary_size=large_vocabulary.size)


def _fill(model: LlamaForCausalLM, tensors: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Copy a file's weights into a model, one by one; names that are missing in the file, and that the model lacks.

    A tied head is one parameter with the embedding, under the embedding's name.

    Raises:
        ValueError: what is in the file is malformed, or of another shape.
    """
    parameters = dict(model.named_parameters())
    found = set()
    with torch.no_grad():
        for name, value in expanded(tensors):
            found.add(name)
            if name in parameters:
                if value.shape != parameters[name].shape:
                    raise ValueError(f"{name} is {list(value.shape)}, not {list(parameters[name].shape)}")
                parameters[name].copy_(value)
    return set(parameters) - found, found - set(parameters)


def _load_transformers(spec: str, large_vocabulary: Vocabulary) -> BaseLM:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(spec)
        model = AutoModelForCausalLM.from_pretrained(spec, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"cannot load the small LM {spec!r}: {str(error).splitlines()[0]}",
            hint="a directory with config.json, tokenizer.json and *.safetensors, or a reachable Hugging Face id",
        ) from None
    vocabulary = Vocabulary.from_tokenizer(tokenizer.backend_tokenizer)
    return BaseLM(model, TokenMap.between(vocabulary, large_vocabulary), spec)
