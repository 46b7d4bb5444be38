"""A Llama in plain tensors: the teacher that writes and scores text on a GPU, and the small model that learns from it.

Pure functions over dictionaries of weights under Transformers' own names, so that one function compiles once for all
layers, decoding fits into a CUDA graph, and what is trained is exported without renaming.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = Mapping[str, Tensor]
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Shape:
    """What the weights do not say themselves.

    Attributes:
        layers: how many.
        heads, kv_heads: of attention; each 64 wide in SmolLM2.
        theta: base of the rotary angles.
        epsilon: of the norms.
    """

    layers: int
    heads: int = 9
    kv_heads: int = 3
    theta: float = 100_000.0
    epsilon: float = 1e-5

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """That of a model in Transformers' format."""
        config = json.loads((folder / "config.json").read_text())
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        return cls(
            config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"],
            float(theta), config["rms_norm_eps"],
        )  # fmt: skip


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model in Transformers' format, a tied head left out."""
    state = load_file(folder / "model.safetensors")
    return {name: tensor.to(device, dtype) for name, tensor in state.items() if name != "lm_head.weight"}


def layer_weights(weights: Weights, index: int) -> list[Tensor]:
    """Of one layer, in the order in which `block` takes them."""
    prefix = f"model.layers.{index}."
    return [weights[f"{prefix}{name}.weight"] for name in (*NORMS, *MATRICES)]


def rotary(length: int, shape: Shape, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 `[length, width]`, halves repeated as Transformers lays them out."""
    frequencies = shape.theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`x` `[..., length, width]` turned by its position."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm, formed in float32."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()).to(x.dtype)


def block(x: Tensor, cosines: Tensor, sines: Tensor, shape: Shape, weights: list[Tensor]) -> Tensor:
    """One layer over whole sequences `[rows, length, width]`, causal; matrices are taken in the dtype of `x`."""
    first, second, *matrices = weights
    q, k, v, o, gate, up, down = (matrix.to(x.dtype) for matrix in matrices)
    rows, length, _ = x.shape
    h = norm(x, first, shape.epsilon)
    queries = F.linear(h, q).view(rows, length, shape.heads, -1).transpose(1, 2)
    keys = F.linear(h, k).view(rows, length, shape.kv_heads, -1).transpose(1, 2)
    values = F.linear(h, v).view(rows, length, shape.kv_heads, -1).transpose(1, 2)
    queries, keys = (rotate(part, cosines, sines).to(x.dtype) for part in (queries, keys))
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o)
    h = norm(x, second, shape.epsilon)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def hidden(weights: Weights, ids: Tensor, shape: Shape, dtype: torch.dtype, layer=block) -> Tensor:
    """States after the last norm, `[rows, length, width]` in `dtype`.

    Args:
        ids: int64 `[rows, length]`.
        layer: `block`, or what `torch.compile` made of it.
    """
    embedding = weights["model.embed_tokens.weight"]
    x = F.embedding(ids, embedding).to(dtype)
    cosines, sines = rotary(ids.shape[1], shape, embedding.shape[1] // shape.heads, ids.device)
    for index in range(shape.layers):
        x = layer(x, cosines, sines, shape, layer_weights(weights, index))
    return norm(x, weights["model.norm.weight"], shape.epsilon)


def residual_rms(weights: Weights, ids: Tensor, shape: Shape) -> float:
    """Median root mean square of the last layer's input over positions, the first of each row left out."""
    embedding = weights["model.embed_tokens.weight"]
    x = F.embedding(ids, embedding)
    cosines, sines = rotary(ids.shape[1], shape, embedding.shape[1] // shape.heads, ids.device)
    for index in range(shape.layers - 1):
        x = block(x, cosines, sines, shape, layer_weights(weights, index))
    return float(x[:, 1:].float().square().mean(-1).sqrt().median())


def divided_residual(weights: Weights, shape: Shape, factor: float) -> tuple[dict[str, Tensor], float]:
    """The same function with a residual stream `factor` times smaller, and the norms' new epsilon.

    Every norm forgets the scale of what it reads, as long as its epsilon goes along. What writes into the stream is
    divided; the tied head's logits are made whole again by the last norm's weight.
    """
    writes = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    scaled = {name: tensor / factor if name.endswith(writes) else tensor for name, tensor in weights.items()}
    scaled["model.norm.weight"] = scaled["model.norm.weight"] * factor
    return scaled, shape.epsilon / factor**2
