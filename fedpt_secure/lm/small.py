"""The small LM that clients tune: base weights, LoRA on top, and the flat vector that federation sees of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.compact_weights import expanded
from fedpt_secure.lm.directions import FILE as DIRECTIONS_FILE
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.output_classes import OutputClasses, Ranking, draw_classes
from fedpt_secure.lm.part import TrainedPart
from fedpt_secure.lm.split import EXACT_COMPUTE, SplitLM, TrainingCompute, layer_of, split_model
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary

BUILTIN = "builtin"
FloatVector = npt.NDArray[np.float32]


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


class SmallLM:
    """Base weights, frozen, under one LoRA adapter whose B matrices are trained.

    A is public and frozen: principal directions of the layers' inputs on public text where the small LM ships them
    (`lm.directions`), else random from the run's seed. B starts at zero, so a fresh adapter changes nothing. The
    adapter of a run is the vector of all B entries, in sorted parameter-name order: `adapter_vector`.
    """

    def __init__(
        self,
        base: BaseLM,
        lora: LoraSettings,
        *,
        seed: int,
        device: torch.device,
        compute: TrainingCompute = EXACT_COMPUTE,
        class_ranking: Ranking | None = None,
    ) -> None:
        """Attach a fresh adapter.

        Args:
            compute: how gradients are computed.
            class_ranking: of the head's classes by public text, for training by a sampled softmax.

        Raises:
            ConfigError: the base has none of the modules, or fewer layers, than the settings name.
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
        try:
            # A is public: every client and every later reader derives the same one from the run's seed.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base.model, config)
        except ValueError as error:
            raise ConfigError(f"LoRA does not fit the small LM: {error}", hint="see lora.modules") from None
        self.directions = _choose_directions(base, lora)
        if self.directions == "public" and base.directions is not None:
            _set_directions(self.model, base.directions, lora)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        self.model.to(device)
        self.model.eval()
        self.device = device
        self.compute = compute
        self._class_ranking = class_ranking
        self.token_map = base.token_map
        self.name = base.name
        self._trainable = sorted(
            ((name, p) for name, p in self.model.named_parameters() if p.requires_grad), key=lambda item: item[0]
        )
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

        Raises:
            ModelError: there is no such part in this adapter.
        """
        layers = None if part.layers is None else part.layers & set(self.adapted_layers)
        if (part.layers is not None and layers != part.layers) or layers == frozenset():
            raise ModelError(f"layers {sorted(part.layers or ())} are not among the adapted {self.adapted_layers}")
        columns = []
        for name, parameter in self._trainable:
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
            masks.append(np.broadcast_to(np.arange(parameter.shape[1]) < columns, parameter.shape).reshape(-1))
        return np.concatenate(masks)

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

    def output_classes(self, count: int | None, *, key: bytes) -> OutputClasses | None:
        """A step's classes for a sampled softmax (`lm.output_classes`); None for None: all of them.

        Raises:
            ConfigError: it has no ranking, cannot be cut, or has no more classes than are asked for.
        """
        if count is None:
            return None
        classes = self.token_map.small_vocabulary_size
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
            return torch.cat([p.detach().float().reshape(-1) for p in self.trainable]).cpu().numpy().copy()

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
            for parameter in self.trainable:
                count = parameter.numel()
                parameter.copy_(values[offset : offset + count].view_as(parameter))
                offset += count

    def weights_digest(self, vector: FloatVector) -> bytes:
        """SHA-256 of the whole model with this adapter: what clients sign, so that all of them train the same one."""
        content = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        return hashlib.sha256(bytes.fromhex(self.digest) + content).digest()

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's format; `peft.PeftModel.from_pretrained(base, directory)` loads it."""
        self.model.save_pretrained(str(directory), save_embedding_layers=False)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        layout = {name: list(parameter.shape) for name, parameter in self._trainable}
        digest.update(json.dumps([self.name, layout], sort_keys=True).encode())
        digest.update(self.token_map.small_to_large.astype("<i8").tobytes())
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


def _set_directions(model: PeftModel, directions: Directions, lora: LoraSettings) -> None:
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a = directions.lora_a(name.removeprefix(prefix), lora.rank, whitening=lora.whitening)
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(a)


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
