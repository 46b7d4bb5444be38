"""An exhibit: why LoRA's A is frozen here. Its gradient tells which tokens a text holds.

Rows of dL/dA of the first layer's q, k and v lie in the span of that layer's inputs, which are the normalised
embeddings of the text's tokens. A token of the vocabulary is in the text iff its input lies in that span; that works
while there are fewer different tokens than the 3 r rows, and once B is not zero. The run's updates hold B alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 8
_VOCABULARY, _WIDTH = 512, 64
_RESIDUAL = 1e-3


def span_check(
    rng: np.random.Generator, *, unique_tokens: tuple[int, ...] = (4, 8, 16, 23, 40)
) -> list[dict[str, Any]]:
    """For texts of so many different tokens: how many are found in the gradient of A, and how many falsely."""
    model = _model(int(rng.integers(2**31)))
    inputs = _first_inputs(model)
    rows = []
    for count in unique_tokens:
        tokens = rng.choice(_VOCABULARY, size=count, replace=False)
        gradient = _gradient_of_a(model, torch.tensor(tokens)[None])
        _, values, basis = np.linalg.svd(gradient, full_matrices=False)
        basis = basis[values > 1e-5 * values[0]]
        residual = np.linalg.norm(inputs - inputs @ basis.T @ basis, axis=1)
        present = set(np.flatnonzero(residual < _RESIDUAL).tolist())
        # The last token is only predicted; the model never reads it before a loss.
        read = set(tokens[:-1].tolist())
        rows.append(
            {
                "unique_tokens": len(read),
                "rank": RANK,
                "found": len(present & read),
                "false": len(present - set(tokens.tolist())),
            }
        )
    return rows


def _model(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=64,
            )
        )
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=["q_proj", "k_proj", "v_proj"],
            layers_to_transform=[0],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
    return model.double().eval()


def _first_inputs(model: Any) -> Any:
    """What each token of the vocabulary looks like to the first layer's projections, of length 1: `[V, width]`."""
    core = model.get_base_model().model
    with torch.no_grad():
        values = core.layers[0].input_layernorm(core.embed_tokens.weight)
        return (values / values.norm(dim=1, keepdim=True)).numpy()


def _gradient_of_a(model: Any, ids: torch.Tensor) -> Any:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    parts = [p.grad for name, p in model.named_parameters() if "lora_A" in name and p.grad is not None]
    return torch.cat(parts).numpy()
