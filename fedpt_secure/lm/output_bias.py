"""A trained bias of the head's classes, beside LoRA: which words a text's owners use, whatever comes before them.

An adapter of the layers moves logits by `W delta h`, so that all moves lie in as many dimensions as the head is wide,
and what one rare word needs is spread over all others. A bias adds one number to each class's logit (BitFit: Ben Zaken
et al. 2022; under privacy: Bu et al. 2022, arXiv 2210.00036, who train all biases of a model and no other weights).
Here it is PEFT's own: LoRA on the head with `lora_bias`, whose two matrices stay as they are (B is zero).

**In which units it is trained.** A record's gradient is clipped as a whole and every entry carries the same noise, so
a parameter's scale decides its share of both, and how far a step moves it. Class c is trained as `b_c = u_c beta_c`
with

    u_c = scale (f_c + 3e-4)^(-1/2),

f_c its frequency in public text: `beta` then has about equal curvature in all classes (that of b_c is the class's
probability), until 3e-4, where there is too little of a class to be learned under noise. Units are rounded to powers
of two, so that a vector's way into the model and back changes no bit. They follow from public text alone: clients
differentiate with respect to `beta`, which is a function of a record and the weights like any other gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.part import layer_of

FLOOR: Final = 3e-4
"""Added to a class's frequency."""
HEAD: Final = "lm_head"
PARAMETER: Final = f".{HEAD}.lora_B.default.bias"
"""How the bias's name ends, as a parameter of the PEFT model."""


def class_units(counts: npt.NDArray[np.int64], scale: float) -> torch.Tensor:
    """`u_c` of every class, float32 `[v]`, powers of two.

    Args:
        counts: of each class in public text, `[v]`; not all zero.
        scale: `lora.output_bias`, positive.
    """
    exact = scale * (counts / counts.sum() + FLOOR) ** -0.5
    return torch.from_numpy(np.exp2(np.rint(np.log2(exact)))).float()


def with_output_bias(config: LoraConfig, model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """The configuration of the same LoRA, and of a bias on the head.

    Raises:
        ConfigError: the model's head is no linear layer of that name, or no module is one of `lora.modules`.
    """
    if type(getattr(model, HEAD, None)) is not nn.Linear or HEAD in lora.modules:
        raise ConfigError(
            f"lora.output_bias is {lora.output_bias:g}; it needs a small LM whose head is the linear layer {HEAD!r}, "
            "without an adapter of its own",
            hint="lora.output_bias = 0",
        )
    depth = model.config.num_hidden_layers
    adapted = range(depth - lora.layers if lora.layers else 0, depth)
    # By full names: PEFT's choice of layers would leave out the head, which lies in none.
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.modules and layer_of(name) in adapted
    ]
    if not names:
        raise ConfigError(
            f"no layer of the small LM has a linear layer called {' or '.join(lora.modules)}", hint="see lora.modules"
        )
    return replace(
        config,
        target_modules=[*names, HEAD],
        layers_to_transform=None,
        rank_pattern={HEAD: 1},
        alpha_pattern={HEAD: 1},
        lora_bias=True,
    )


@contextmanager
def expected_warnings() -> Iterator[None]:
    """PEFT's about a head without a bias or tied to the embedding, which is never merged here, and its taking every
    vector of an adapter for a matrix that lost its shape."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lora_bias=True.*", UserWarning)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)
        warnings.filterwarnings("ignore", ".*LoRA tensor.* invalid shape", Warning)
        yield


def head_bias_of(model: PeftModel) -> nn.Linear | None:
    """The layer whose bias it is, which gives the bias for an input of zeros; None for a model without one."""
    head: Any = getattr(model.get_base_model(), HEAD, None)
    if not hasattr(head, "lora_B") or head.lora_B["default"].bias is None:
        return None
    layer: nn.Linear = head.lora_B["default"]
    return layer
