"""The small LM cut in two for training: what lies below the first trained module, and the rest.

Below the cut nothing is trained, so an example's activations there are the same in every step and every round. They are
computed once without gradient and kept, within a bound. Above the cut only what training needs runs: the layers
from the cut on, and, once the last layer's attention has read all positions, the rest of it and the head at the
positions whose loss counts.

Where the only module trained in the lowest trained layer is its `mlp.down_proj`, the cut runs through that layer: its
output is `below + scale * B(A x)`, and `below` and `A x` are what is kept, `width + rank` numbers a position. If it is
the last layer, nothing above mixes positions and only the positions with loss are kept. Otherwise the cut runs below
the layer, and its input is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import nn

from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.head_loss import SampledHead, head_loss
from fedpt_secure.lm.output_bias import PARAMETER, head_bias_of
from fedpt_secure.lm.output_classes import ClassDraw, OutputClasses, StepClasses, likely_classes
from fedpt_secure.lm.part import place_of
from fedpt_secure.lm.shelf import MemoryBound, Shelf
from fedpt_secure.lm.training_compute import TrainingCompute

SPLITTABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose model is embeddings, layers, a norm and a linear head, and whose layers end in `h + mlp(norm(h))`."""

_DOWN_PROJ = "mlp.down_proj."
_Example: TypeAlias = tuple[tuple[int, ...], int]
"""Token ids, and the first position with loss where only positions with loss are kept (else 0)."""


@dataclass(frozen=True, slots=True)
class Activations:
    """What is kept of one example.

    Attributes:
        below: [positions, width]: the adapted layer's output without its adapter, or the layer's input.
        inputs: [positions, rank]: `A x`, where the cut runs through a layer.
    """

    below: torch.Tensor
    inputs: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.below.nbytes + (0 if self.inputs is None else self.inputs.nbytes)


@dataclass(frozen=True, slots=True)
class _Frozen:
    """What the lower half computes with, as its parameters were at these versions."""

    versions: tuple[tuple[int, int], ...]
    below: nn.Module | None
    tap: _Tap | None
    head_weight: torch.Tensor


class SplitLM:
    """The two halves of one small LM.

    **Guarantees** Kept activations are bit for bit those that would be computed again, if the processor repeats itself:
    they come from the same operations on the same ids. They are dropped when a parameter below the cut has been written
    to or replaced. Examples are never computed together.
    """

    def __init__(self, model: PeftModel, trained: Mapping[int, Sequence[str]], compute: TrainingCompute) -> None:
        """Cut below the first of the trained parameters; use `split_model`, which says whether that can be done.

        Args:
            trained: names of trained parameters within their layer, by layer.
        """
        causal: Any = model.get_base_model()
        self._backbone: Any = causal.model
        self._head = _plain_head(causal)
        self._head_bias = head_bias_of(model)
        self._compute = compute
        self._layer = min(trained)
        self._through = all(name.startswith(_DOWN_PROJ) for name in trained[self._layer])
        layers = self._backbone.layers
        self._adapted: Any = layers[self._layer].mlp.down_proj if self._through else None
        first_above = self._layer + self._through
        self._by_position = first_above == len(layers)
        above = [_Skip() if index < first_above else layer for index, layer in enumerate(layers)]
        self._last: _AskedRows | None = None
        if not self._by_position:
            above[-1] = self._last = _AskedRows(layers[-1])
        self._above = _with_layers(self._backbone, above)
        self._frozen_part: _Frozen | None = None
        self._memory = MemoryBound(compute.cache_bytes)
        self._kept: Shelf[_Example, Activations] = Shelf(self._memory)
        self._likely: Shelf[_Example, torch.Tensor] = Shelf(self._memory)
        self._sampled: tuple[OutputClasses, _Frozen, SampledHead] | None = None

    @property
    def knows_base(self) -> bool:
        """Whether what is below the cut says what the model would predict without its adapter."""
        return self._by_position

    @property
    def cached_bytes(self) -> int:
        """Bytes of kept activations and likely classes, at most the bound."""
        return self._memory.held

    @property
    def cached_examples(self) -> int:
        """How many examples' activations are kept."""
        return len(self._kept)

    def forget(self, ids: tuple[int, ...], loss_from: int) -> None:
        """Drop what is kept of an example, if anything is; it is computed again when it is asked for again."""
        key = self._key(ids, loss_from)
        self._kept.drop(key)
        self._likely.drop(key)

    def loss(
        self, ids: tuple[int, ...], loss_from: int, rows: torch.Tensor, classes: StepClasses | None = None
    ) -> torch.Tensor:
        """Mean negative log-likelihood (nats per token) over some of an example's predictions.

        Args:
            ids: token ids of one example.
            loss_from: first position that may be predicted with loss.
            rows: int64 [n]; row i stands for the prediction of position `loss_from + i`.
            classes: what the softmax is over, beside each prediction's own class; all if None.

        Raises:
            ConfigError: classes of the example's own are asked for, and `knows_base` is false.
        """
        frozen = self._refreshed()
        activations = self._activations(frozen, ids, loss_from)
        targets = torch.tensor(ids[loss_from:], device=activations.below.device)[rows]
        below, inputs = activations.below, activations.inputs
        if self._by_position:
            below, inputs = below[rows], None if inputs is None else inputs[rows]
        # The adapter's own products and the sum with it are in float32: its steps are smaller than bfloat16's.
        hidden = below.float()[None]
        if self._adapted is not None and inputs is not None:
            adapter = self._adapted.active_adapters[0]
            moved = self._adapted.lora_B[adapter](inputs.float()[None])
            hidden = hidden + moved * self._adapted.scaling[adapter]
        if self._last is None:
            judged = self._backbone.norm(hidden)
        else:
            self._last.rows = loss_from - 1 + rows
            with torch.autocast(hidden.device.type, self._compute.dtype, enabled=self._lower):
                judged = self._above(inputs_embeds=hidden, use_cache=False).last_hidden_state
        if isinstance(classes, ClassDraw):
            likely = self._likely_classes(frozen, ids, loss_from, activations, classes.own)
            sampled: SampledHead | None = SampledHead.of(frozen.head_weight, classes.with_own(likely))
        else:
            sampled = None if classes is None else self._sampled_head(frozen, classes)
        return head_loss(judged[0].float(), frozen.head_weight, targets, sampled, self._bias())

    def _bias(self) -> torch.Tensor | None:
        """The head's bias, by its layer: whoever watches the layer sees one example's gradient at it, `[1, 1, v]`."""
        if self._head_bias is None:
            return None
        bias: torch.Tensor = self._head_bias(self._head.weight.new_zeros(1, 1, 1, dtype=torch.float32))
        return bias[0, 0]

    def _sampled_head(self, frozen: _Frozen, classes: OutputClasses) -> SampledHead:
        """Gathered once for all examples of a step."""
        if self._sampled is None or self._sampled[0] is not classes or self._sampled[1] is not frozen:
            self._sampled = classes, frozen, SampledHead.of(frozen.head_weight, classes)
        return self._sampled[2]

    def _likely_classes(
        self, frozen: _Frozen, ids: tuple[int, ...], loss_from: int, activations: Activations, count: int
    ) -> torch.Tensor:
        """An example's own classes, by all its positions with loss whichever a step looks at; kept like activations."""
        if not self.knows_base:
            raise ConfigError("classes by the record need an adapter of nothing but the last layer's down_proj")
        key = self._key(ids, loss_from)
        kept = self._likely.get(key)
        if kept is None or len(kept) != count:
            targets = torch.tensor(ids[loss_from:], device=activations.below.device)
            hidden = self._backbone.norm(activations.below.float())
            kept = likely_classes(hidden, frozen.head_weight, targets, count).int()
            self._likely.keep(key, kept)
        return kept.long()

    @property
    def _lower(self) -> bool:
        return self._compute.dtype != torch.float32

    def _key(self, ids: tuple[int, ...], loss_from: int) -> _Example:
        return ids, loss_from if self._by_position else 0

    def _activations(self, frozen: _Frozen, ids: tuple[int, ...], loss_from: int) -> Activations:
        key = self._key(ids, loss_from)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._run_below(frozen, ids, loss_from)
            self._kept.keep(key, kept)
        return kept

    @torch.no_grad()
    def _run_below(self, frozen: _Frozen, ids: tuple[int, ...], loss_from: int) -> Activations:
        below = self._backbone.embed_tokens(torch.tensor([ids], device=self._head.weight.device))
        if frozen.below is not None:
            below = frozen.below(inputs_embeds=below.to(self._compute.dtype), use_cache=False).last_hidden_state
        inputs = None if frozen.tap is None else frozen.tap.take()
        rows = slice(loss_from - 1, len(ids) - 1) if self._by_position else slice(None)
        # Copies, so that memory is aligned alike whether they were kept or not, and nothing else is kept alive.
        return Activations(below[0, rows].clone(), None if inputs is None else inputs[0, rows].clone())

    def _refreshed(self) -> _Frozen:
        """The frozen part; cast again, and what is kept forgotten, where one of its parameters has changed."""
        versions = tuple((parameter.data_ptr(), parameter._version) for parameter in self._frozen_parameters())
        if self._frozen_part is None or versions != self._frozen_part.versions:
            self._kept.clear()
            self._likely.clear()
            below, tap = self._build_below()
            self._frozen_part = _Frozen(versions, below, tap, self._head.weight.detach().to(self._compute.dtype))
        return self._frozen_part

    def _frozen_parameters(self) -> list[nn.Parameter]:
        layers = self._backbone.layers
        modules: list[nn.Module] = [
            self._head,
            self._backbone.norm,
            self._backbone.embed_tokens,
            *layers[: self._layer],
        ]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self._through:
            parameters += [p for name, p in layers[self._layer].named_parameters() if ".lora_B." not in name]
        return parameters

    def _build_below(self) -> tuple[nn.Module | None, _Tap | None]:
        if self._layer == 0 and not self._through:
            return None, None
        layers = list(self._backbone.layers[: self._layer])
        if self._adapted is not None:
            adapter = self._adapted.active_adapters[0]
            tap = _Tap(self._adapted.base_layer, self._adapted.lora_A[adapter])
            mlp = _with_modules(self._backbone.layers[self._layer].mlp, down_proj=tap)
            layers.append(_with_modules(self._backbone.layers[self._layer], mlp=mlp))
        below = _with_layers(self._backbone, layers, norm=nn.Identity())
        if self._lower:
            # The rotary embedding stays in float32: its frequencies times positions need the digits.
            rotary = below._modules.pop("rotary_emb")
            below = _cast_copy(below, self._compute.dtype)
            below._modules["rotary_emb"] = rotary
        taps = [module for module in below.modules() if isinstance(module, _Tap)]
        return below, taps[0] if taps else None


class _Skip(nn.Module):
    """In the place of a layer that has been run already."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


class _AskedRows(nn.Module):
    """The last layer, which leaves out the positions that nobody asks for once its attention has read them.

    Attributes:
        rows: int64 [n], the positions that the next pass is asked for.
    """

    rows: torch.Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer: Any = layer

    def forward(self, hidden_states: torch.Tensor, **context: Any) -> torch.Tensor:
        attended, _ = self._layer.self_attn(hidden_states=self._layer.input_layernorm(hidden_states), **context)
        asked = (hidden_states + attended)[:, self.rows]
        moved: torch.Tensor = asked + self._layer.mlp(self._layer.post_attention_layernorm(asked))
        return moved


class _Tap(nn.Module):
    """An adapted linear layer without its adapter, which remembers what `A` makes of its input."""

    def __init__(self, base_layer: nn.Module, lora_a: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = lora_a
        self._seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        self._seen = self.lora_a(x)
        return self.base_layer(x)

    def take(self) -> torch.Tensor | None:
        """What was seen last; forgotten with this."""
        seen, self._seen = self._seen, None
        return seen


def split_model(model: PeftModel, trained: Sequence[str], compute: TrainingCompute) -> SplitLM | None:
    """The model cut below the first trained parameter, or None where it is not of a shape that can be cut.

    Args:
        trained: names of the trained parameters, as in `model.named_parameters()`.
    """
    causal: Any = model.get_base_model()
    if getattr(causal.config, "model_type", None) not in SPLITTABLE:
        return None
    adapted = head_bias_of(model) is not None  # by nothing but a bias; otherwise an adapted head is a PEFT layer
    head = _plain_head(causal) if adapted else getattr(causal, "lm_head", None)
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    by_layer: dict[int, list[str]] = {}
    for name in trained:
        if name.endswith(PARAMETER):
            continue
        place = place_of(name)
        if place is None:
            return None
        by_layer.setdefault(place[0], []).append(place[1])
    return SplitLM(model, by_layer, compute) if by_layer else None


def _plain_head(causal: Any) -> nn.Linear:
    head: nn.Linear = getattr(causal.lm_head, "base_layer", causal.lm_head)
    return head


def _with_modules(module: nn.Module, **replaced: nn.Module) -> nn.Module:
    """The same module, sharing all parameters, but for the replaced children."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **replaced}
    return changed


def _with_layers(backbone: nn.Module, layers: Sequence[nn.Module], **replaced: nn.Module) -> nn.Module:
    changed = _with_modules(backbone, layers=nn.ModuleList(layers), **replaced)
    del changed._modules["embed_tokens"]  # it runs on embedded text, and a cast copy need not hold them twice
    return changed


def _cast_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype that is never held in the first one as well."""
    cast = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, dict(cast)).to(dtype)
