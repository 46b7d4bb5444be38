"""LoRA's frozen A matrices from public text: the directions in which a layer's inputs vary most.

With A frozen, an adapter can only react to what A lets through. A random A of rank r passes about r/d of the energy
of a layer's input; the top r principal directions of the inputs, measured on public text with the base model, pass most
of it. So each trained entry of B sees more signal, while the noise of DP-SGD on it stays the same (the idea of EVA,
Paischer et al. 2024, arXiv 2410.07170, here for a frozen A). No private text is involved, so it costs no budget.
Measured effect: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpt_secure.errors import ConfigError, ModelError

FILE = "directions.safetensors"
_UNIT_ENERGY = 1 / 3
"""Mean square of a component of `A x` that PEFT's random A (Kaiming uniform) has for inputs of unit mean square."""
_SCALED_BY = 32
"""The strongest directions by whose energy A is scaled, so that a wider adapter adds columns and changes none."""
_READS_WITH = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linear layers whose input another one of the same block reads too, so that its directions are theirs."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Principal directions of the inputs of a model's linear layers.

    Attributes:
        rows: layer name -> orthonormal rows `[k, in_features]`, strongest first (up to rounding, once saved). Layers
            that read the same input need only one entry: `q_proj` is `k_proj`'s and `v_proj`'s too, `gate_proj`
            `up_proj`'s.
        energies: layer name -> mean square of the input along each row, `[k]`.
    """

    rows: dict[str, Tensor]
    energies: dict[str, Tensor]

    def lora_a(self, layer: str, rank: int, *, whitening: float = 0.0) -> Tensor:
        """A `[rank, in_features]` for one layer, scaled so that the strongest components of `A x`, up to 32 of them,
        have the mean energy they have for a random A; the others are weaker, as the inputs are.

        Args:
            whitening: how much of that difference is taken out: 0 leaves it, 1 gives all components the same energy.

        Raises:
            ConfigError: there are no directions for the layer, or fewer than the rank.
        """
        stored = layer if layer in self.rows else _reader_of_the_same_input(layer)
        rows = self.rows.get(stored)
        if rows is None or len(rows) < rank:
            known = 0 if rows is None else len(rows)
            raise ConfigError(
                f"lora.rank {rank} needs {rank} public directions for {layer}; the small LM ships {known}",
                hint='a smaller rank, or lora.directions = "random"',
            )
        strongest = self.energies[stored][: min(rank, _SCALED_BY)]
        scale = (_UNIT_ENERGY / strongest.mean()).sqrt()
        if whitening:
            weakest = self.energies[stored].max() * torch.finfo(torch.float32).eps
            relative = self.energies[stored][:rank].clamp(min=weakest) / strongest.mean()
            scale = scale * relative.pow(-whitening / 2)[:, None]
        return rows[:rank].float() * scale

    def save(self, path: Path) -> None:
        """Write a safetensors file; rows in float16, whose rounding moves a direction by some 1e-4 of its length."""
        tensors = {f"{layer}.rows": rows.half().contiguous() for layer, rows in self.rows.items()}
        tensors |= {f"{layer}.energies": energies.contiguous() for layer, energies in self.energies.items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Directions:
        """Read what `save` wrote.

        Raises:
            ModelError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"public directions {path} cannot be read: {error}", hint="reinstall fedpt-secure"
            ) from None
        layers = sorted(name.removesuffix(".rows") for name in tensors if name.endswith(".rows"))
        try:
            return cls(
                {layer: tensors[f"{layer}.rows"] for layer in layers},
                {layer: tensors[f"{layer}.energies"] for layer in layers},
            )
        except KeyError as error:
            raise ModelError(f"public directions {path} lack {error}", hint="reinstall fedpt-secure") from None


def principal_directions(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, modules: Sequence[str], count: int
) -> Directions:
    """Measure the directions of a base model's layer inputs on public sequences.

    The second moment is not centred: an input's mean is its strongest direction, and what lets B learn a bias.

    Args:
        model: a causal LM without adapter.
        sequences: public token ids, in the model's vocabulary.
        modules: last parts of the names of linear layers.
        count: directions per layer.
    """
    moments: dict[str, Tensor] = {}
    tokens = sum(map(len, sequences))
    with _accumulating(model, tuple(modules), moments), torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]), use_cache=False)
    rows, energies = {}, {}
    for layer, moment in moments.items():
        values, vectors = torch.linalg.eigh(moment / tokens)
        chosen = vectors.flip(1)[:, :count].T
        # An eigenvector's sign is arbitrary; fix it, so that the file does not depend on the library.
        chosen = chosen * chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
        rows[layer] = chosen.float()
        energies[layer] = values.flip(0)[:count].float()
    return Directions(rows, energies)


def _reader_of_the_same_input(layer: str) -> str:
    block, _, module = layer.rpartition(".")
    return f"{block}.{_READS_WITH.get(module, module)}"


@contextmanager
def _accumulating(model: nn.Module, modules: tuple[str, ...], moments: dict[str, Tensor]) -> Iterator[None]:
    def record(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            moments[layer] = moments.get(layer, 0) + flat.T @ flat

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
