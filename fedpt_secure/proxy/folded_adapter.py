"""Base and tuned predictions of a LoRA model in one forward pass.

Below its first adapted layer a LoRA model computes the same for both sides. The pass runs those layers once per row;
from the first adapted layer on it carries every row twice, base in the first half of the batch and tuned in the
second, and the adapter's correction `scale * B A x` is added to the second half only. Each side is computed by the same
operations as in a pass of its own. With LoRA in the last of six layers, one layer of six runs on twice the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor


class FoldedAdapter:
    """The forward of a LoRA model with rows `[base ..., tuned ...]` in its output.

    The adapter's values are read at every pass. After a pass the model is as it was found.

    Attributes:
        copies: how many rows each layer computes per row of the batch: 1 below the first adapted layer, then 2.
    """

    def __init__(self, model: PeftModel, layers: list[torch.nn.Module], adapted: list[LoraLinear], first: int) -> None:
        self._model: Any = model.get_base_model()
        self._layers = layers
        self._first = first
        self._adapted = adapted
        self._adapter = model.active_adapter
        self.copies = [1 if index < first else 2 for index in range(len(layers))]

    @classmethod
    def of(cls, model: PeftModel) -> FoldedAdapter | None:
        """None where this way is not exact: more than one plain LoRA adapter on linear layers of a stack of layers."""
        lora = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        layers = _stack(model)
        plain = [
            module
            for module in lora.values()
            if isinstance(module, LoraLinear) and _plain(module, model.active_adapter)
        ]
        if layers is None or not lora or len(plain) < len(lora):
            return None
        prefix, stack = layers
        numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in lora]
        inside = [int(found[1]) for found in numbers if found]
        # The head runs after all layers, on twice the rows as the last of them.
        base: Any = model.get_base_model()
        head = base.get_output_embeddings()
        outside = sum(module is head for module in lora.values())
        if not inside or len(inside) + outside < len(lora):
            return None
        return cls(model, stack, plain, min(inside))

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for `input_ids` `[batch, seq]`; its logits are `[2 * batch, seq, width]`.

        The model must be in evaluation mode.
        """
        with self._folded(inputs["input_ids"].shape[0]):
            return self._model(**inputs)

    @contextmanager
    def _folded(self, batch: int) -> Iterator[None]:
        def double(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return _doubled(args, batch), _doubled(kwargs, batch)

        with ExitStack() as undo:
            for layer in self._layers[self._first :]:
                undo.callback(layer.register_forward_pre_hook(double, with_kwargs=True).remove)
            for module in self._adapted:
                # An instance's own `forward` comes before its class's; deleting it brings the class's back.
                module.forward = _corrected_second_half(module, self._adapter)  # type: ignore[method-assign]
                undo.callback(module.__dict__.pop, "forward")
            yield


def _corrected_second_half(module: LoraLinear, adapter: str) -> Callable[..., Tensor]:
    a: Any
    a, b, scale = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]

    def forward(x: Tensor) -> Tensor:
        result: Tensor = module.base_layer(x)
        half = x.shape[0] // 2
        result[half:] += (b(a(x[half:].to(a.weight.dtype))) * scale).to(result.dtype)
        return result

    return forward


def _doubled(value: Any, batch: int) -> Any:
    """Every tensor with a row per row of the batch, twice below itself; all else as it is."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() >= 2 and value.shape[0] == batch else value
    if type(value) is tuple:
        return tuple(_doubled(part, batch) for part in value)
    if isinstance(value, dict):
        return {name: _doubled(part, batch) for name, part in value.items()}
    return value


def _stack(model: PeftModel) -> tuple[str, list[torch.nn.Module]] | None:
    """The decoder layers and their name: the one list of modules that is as long as the model is deep."""
    base: Any = model.get_base_model()
    depth = base.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    return found[0] if len(found) == 1 else None


def _plain(module: LoraLinear, adapter: Any) -> bool:
    """Whether a LoRA layer computes `base(x) + scale * (B A x + its bias)` and nothing else."""
    return (
        isinstance(adapter, str)
        and set(module.lora_A) == {adapter}
        and not module.merged
        and not module.disable_adapters
        and adapter not in module.lora_variant
    )
