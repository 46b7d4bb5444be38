"""How gradients are computed: the dtype of matrix products, and the memory for what need not be computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedpt_secure.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingCompute:
    """How gradients are computed. It changes their rounding, never what they are gradients of.

    Attributes:
        dtype: of matrix products in training, float32 or bfloat16; adapter, softmax and clipping are in float32 or
            finer.
        cache_bytes: most memory for kept activations; 0 keeps none.
    """

    dtype: torch.dtype = torch.float32
    cache_bytes: int = 0


EXACT_COMPUTE = TrainingCompute()
"""In float32, and nothing kept."""


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it in hardware, else float32.

    Raises:
        ConfigError: not one of `auto`, `float32` and `bfloat16`.
    """
    if name == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"training_dtype {name!r} is not one of auto, float32 and bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes: list[Callable[[], bool]] = [
        getattr(torch.cpu, name)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if hasattr(torch.cpu, name)
    ]
    return device.type == "cpu" and any(probe() for probe in probes)
