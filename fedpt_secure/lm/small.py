"""The small LM that clients tune: base weights, LoRA on top, and the flat vector that federation sees of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedpt_secure.config import ClassesBy, LoraSettings
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.output_bias import HEAD, PARAMETER, class_units, expected_warnings, with_output_bias
from fedpt_secure.lm.output_classes import StepClasses, draw_classes, draw_rest, rank_classes
from fedpt_secure.lm.part import TrainedPart, layer_of
from fedpt_secure.lm.split import SplitLM, split_model
from fedpt_secure.lm.training_compute import EXACT_COMPUTE, TrainingCompute

FloatVector = npt.NDArray[np.float32]


class SmallLM:
    """Base weights, frozen, under one LoRA adapter whose B matrices are trained, and the head's biases if asked for.

    A is public and frozen: principal directions of the layers' inputs on public text where the small LM ships them
    (`lm.directions`), else random from the run's seed. B starts at zero, so a fresh adapter changes nothing. The
    adapter of a run is the vector of all B entries, and of the biases in their units (`lm.output_bias`), in sorted
    parameter-name order: `adapter_vector`.
    """

    def __init__(
        self,
        base: BaseLM,
        lora: LoraSettings,
        *,
        seed: int,
        device: torch.device,
        compute: TrainingCompute = EXACT_COMPUTE,
        class_counts: npt.NDArray[np.int64] | None = None,
        classes_by: ClassesBy = "frequency",
    ) -> None:
        """Attach a fresh adapter.

        Args:
            compute: how gradients are computed.
            class_counts: of the head's classes in public text, for a sampled softmax by frequency and for
                `lora.output_bias`.
            classes_by: what chooses the classes of a sampled softmax that are not drawn.

        Raises:
            ConfigError: the base has none of the modules, or fewer layers, than the settings name, or its head cannot
                have a bias.
        """
        layers = base.model.config.num_hidden_layers
        if lora.layers > layers:
            raise ConfigError(
                f"lora.layers is {lora.layers}, but the small LM has {layers} layers", hint="0 trains all of them"
            )
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # PEFT divides it by the rank again
            target_modules=list(lora.modules),
            layers_to_transform=list(range(layers - lora.layers, layers)) if lora.layers else None,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        units = _bias_units(base, lora, class_counts)
        if units is not None:
            config = with_output_bias(config, base.model, lora)
        try:
            # A is public: every client and every later reader derives the same one from the run's seed.
            with torch.random.fork_rng(devices=[]), expected_warnings():
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base.model, config)
        except ValueError as error:
            raise ConfigError(f"LoRA does not fit the small LM: {error}", hint="see lora.modules") from None
        self.directions = _choose_directions(base, lora)
        if self.directions == "public" and base.directions is not None:
            _set_directions(self.model, base.directions, lora)
        for name, parameter in self.model.named_parameters():
            if units is not None and f".{HEAD}." in name:
                parameter.requires_grad_(name.endswith(PARAMETER))
            else:
                parameter.requires_grad_(name.endswith("lora_B.default.weight"))
        self.model.to(device)
        self.model.eval()
        self.device = device
        self.compute = compute
        self._classes_by = classes_by
        self._class_ranking = None if class_counts is None else rank_classes(class_counts)
        self.token_map = base.token_map
        self.name = base.name
        self._trainable = sorted(
            ((name, p) for name, p in self.model.named_parameters() if p.requires_grad), key=lambda item: item[0]
        )
        self._units = [units if name.endswith(PARAMETER) else None for name, _ in self._trainable]
        self.digest = self._digest()
        self.split: SplitLM | None = split_model(self.model, self.trained_names, compute)
        """The model cut below its first trained module, for one example's gradient; None if it cannot be cut."""
        self._splits_of_parts: dict[frozenset[int], SplitLM | None] = {}

    @property
    def dimension(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for _, parameter in self._trainable)

    @property
    def adapted_layers(self) -> tuple[int, ...]:
        """Indices of the layers with an adapter, ascending."""
        return tuple(sorted({layer for layer in map(layer_of, self.trained_names) if layer is not None}))

    def trains(self, part: TrainedPart) -> list[int]:
        """How many columns of each trained parameter belong to a part, in the order of `adapter_vector`.

        The head's bias is one column, and belongs to every part: every gradient starts there.

        Raises:
            ModelError: there is no such part in this adapter.
        """
        layers = None if part.layers is None else part.layers & set(self.adapted_layers)
        if (part.layers is not None and layers != part.layers) or layers == frozenset():
            raise ModelError(f"layers {sorted(part.layers or ())} are not among the adapted {self.adapted_layers}")
        columns = []
        for name, parameter in self._trainable:
            if parameter.dim() == 1:
                columns.append(1)
                continue
            rank = parameter.shape[1]
            if part.rank is not None and not 1 <= part.rank <= rank:
                raise ModelError(f"a part of rank {part.rank} is not one of an adapter of rank {rank}")
            inside = layers is None or layer_of(name) in layers
            columns.append((rank if part.rank is None else part.rank) if inside else 0)
        return columns

    def coordinates(self, part: TrainedPart) -> npt.NDArray[np.bool_]:
        """Which entries of `adapter_vector` belong to a part, `[dimension]`."""
        masks = []
        for parameter, columns in zip(self.trainable, self.trains(part), strict=True):
            rows, width = len(parameter), parameter[0].numel()
            masks.append(np.broadcast_to(np.arange(width) < columns, (rows, width)).reshape(-1))
        return np.concatenate(masks)

    def in_units(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per-example gradients by the trained parameters, made those by `adapter_vector`'s entries.

        Args:
            gradients: `[n, ...]` of each trained parameter, in the order of `trainable`.

        Returns: `[n, entries]` of each; side by side they are `[n, dimension]`.
        """
        rows = [gradient.flatten(1) for gradient in gradients]
        units = zip(rows, self._units, strict=True)
        return [row if unit is None else row * unit.to(row.device) for row, unit in units]

    @property
    def has_units(self) -> bool:
        """Whether an entry of `adapter_vector` is another number than the parameter it stands for."""
        return any(unit is not None for unit in self._units)

    def split_for(self, part: TrainedPart) -> SplitLM | None:
        """The model cut below the part's lowest layer, made when it is first asked for; None if it cannot be cut.

        Each cut keeps activations of its own, within `compute.cache_bytes`.
        """
        if part.layers is None or self.split is None or part.layers == set(self.adapted_layers):
            return self.split
        if part.layers not in self._splits_of_parts:
            names = [name for name in self.trained_names if layer_of(name) in part.layers]
            self._splits_of_parts[part.layers] = split_model(self.model, names, self.compute)
        return self._splits_of_parts[part.layers]

    def output_classes(self, count: int | None, *, key: bytes) -> StepClasses | None:
        """A step's classes for a sampled softmax (`lm.output_classes`); None for None: all of them.

        Raises:
            ConfigError: it has no more classes than are asked for, cannot be cut, or has no ranking; or the record is
                to choose, and more is trained than the last layer's `down_proj` and the head's bias.
        """
        if count is None:
            return None
        classes = self.token_map.small_vocabulary_size
        if self._classes_by == "record":
            if self.split is None or not self.split.knows_base or not 3 <= count < classes:
                raise ConfigError(
                    f'training.output_classes is {count} and training.output_classes_by is "record"; that needs at '
                    f"least 3 and fewer than the {classes} classes of a small LM of the Llama kind, of which nothing "
                    "but the last layer's down_proj (and lora.output_bias) is trained",
                    hint='training.output_classes_by = "frequency" suits any adapter',
                )
            return draw_rest(classes, count, key=key)
        if self._class_ranking is None or self.split is None or not 2 <= count < classes:
            raise ConfigError(
                f"training.output_classes is {count}; it must be at least 2 and below the {classes} classes of a small "
                "LM of the Llama kind, ranked by public text",
                hint="leave it out to train with the whole head",
            )
        return draw_classes(self._class_ranking, count, key=key)

    def forget(self, ids: tuple[int, ...], loss_from: int) -> None:
        """Drop the activations that are kept of an example (`split.SplitLM`); nothing but memory changes."""
        for split in (self.split, *self._splits_of_parts.values()):
            if split is not None:
                split.forget(ids, loss_from)

    @property
    def trained_names(self) -> list[str]:
        """Names of the trained parameters, as in `model.named_parameters()`, in the order of `adapter_vector`."""
        return [name for name, _ in self._trainable]

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in the order of `adapter_vector`."""
        return [parameter for _, parameter in self._trainable]

    def adapter_vector(self) -> FloatVector:
        """The trained parameters as one float32 vector `[dimension]` (a copy)."""
        with torch.no_grad():
            values = [p.detach().float().cpu().reshape(-1) for p in self.trainable]
            in_units = [v if unit is None else v / unit for v, unit in zip(values, self._units, strict=True)]
            return torch.cat(in_units).numpy().copy()

    def load_adapter_vector(self, vector: FloatVector) -> None:
        """Set the trained parameters from a vector `[dimension]`.

        Raises:
            ModelError: another length, or entries that are not finite.
        """
        if vector.shape != (self.dimension,):
            raise ModelError(f"adapter vector has shape {vector.shape}, this adapter has ({self.dimension},)")
        if not np.isfinite(vector).all():
            raise ModelError("adapter vector holds entries that are not finite")
        values = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32)).to(self.device)
        offset = 0
        with torch.no_grad():
            for parameter, unit in zip(self.trainable, self._units, strict=True):
                count = parameter.numel()
                value = values[offset : offset + count].view_as(parameter)
                parameter.copy_(value if unit is None else value * unit.to(self.device))
                offset += count

    def weights_digest(self, vector: FloatVector) -> bytes:
        """SHA-256 of the whole model with this adapter: what clients sign, so that all of them train the same one."""
        content = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        return hashlib.sha256(bytes.fromhex(self.digest) + content).digest()

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's format; `peft.PeftModel.from_pretrained(base, directory)` loads it."""
        with expected_warnings():
            self.model.save_pretrained(str(directory), save_embedding_layers=False)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        layout = {name: list(parameter.shape) for name, parameter in self._trainable}
        digest.update(json.dumps([self.name, layout], sort_keys=True).encode())
        digest.update(self.token_map.small_to_large.astype("<i8").tobytes())
        for unit in self._units:
            if unit is not None:
                digest.update(unit.numpy().astype("<f4").tobytes())
        for name, parameter in sorted(self.model.named_parameters(), key=lambda item: item[0]):
            if not parameter.requires_grad:
                digest.update(name.encode())
                values = parameter.detach().float().cpu().contiguous().numpy()
                digest.update(np.ascontiguousarray(values, dtype="<f4").data)
        return digest.hexdigest()


def _choose_directions(base: BaseLM, lora: LoraSettings) -> str:
    if lora.directions == "public" and base.directions is None:
        raise ConfigError(
            f"the small LM {base.name!r} ships no public directions for LoRA", hint='lora.directions = "random"'
        )
    chosen = lora.directions
    if chosen == "auto":
        chosen = "random" if base.directions is None else "public"
    if lora.whitening and chosen != "public":
        raise ConfigError(
            f"lora.whitening is {lora.whitening:g}, but the adapter of {base.name!r} has random directions",
            hint="lora.whitening = 0; a random A lets all components through alike",
        )
    return chosen


def _bias_units(base: BaseLM, lora: LoraSettings, class_counts: npt.NDArray[np.int64] | None) -> torch.Tensor | None:
    if not lora.output_bias:
        return None
    if class_counts is None:
        raise ConfigError(f"lora.output_bias is {lora.output_bias:g}, and nothing is known of the classes' frequency")
    model: Any = base.model
    if len(class_counts) != model.get_output_embeddings().weight.shape[0]:
        raise ConfigError(
            f"lora.output_bias is {lora.output_bias:g}, and the small LM's head has other classes than its vocabulary",
            hint="lora.output_bias = 0",
        )
    return class_units(class_counts, lora.output_bias)


def _set_directions(model: PeftModel, directions: Directions, lora: LoraSettings) -> None:
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if lora.output_bias and name == prefix + HEAD:
            continue  # its A is multiplied by zero
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a = directions.lora_a(name.removeprefix(prefix), lora.rank, whitening=lora.whitening)
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(a)
