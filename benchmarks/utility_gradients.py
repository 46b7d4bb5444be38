"""Clipped sums over many records in shared passes, for the *simulation* of training runs (`utility_study.py`).

What `privacy.clipped_sum` computes one record at a time, up to rounding and without its guarantees: here records share
arrays, products may be in bfloat16, sums are not on a grid, and which positions a record is asked at is drawn on the
device. That is enough to compare settings, and a hundred times as fast on a GPU. No product code may import it.

Where all that is trained is `down_proj` of the last layer, what lies below is computed once (`lm.split` does the same).
Otherwise the whole small LM runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedpt_secure.errors import DataError
from fedpt_secure.lm.head_loss import SampledHead, head_loss
from fedpt_secure.lm.output_bias import PARAMETER, head_bias_of
from fedpt_secure.lm.output_classes import ClassDraw, likely_classes
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SmallExample

Vector = npt.NDArray[np.float64]
_HEAD_ROWS = 8192
_LOWER_HALF_RECORDS = 64


class RecordSums:
    """A fixed list of records on the small LM's device, and sums of their clipped gradients.

    Attributes:
        rows: int64 `[records]`, how many tokens with loss each has.
    """

    def __init__(self, small: SmallLM, examples: Sequence[SmallExample], *, dtype: torch.dtype, at_once: int) -> None:
        """Lay the records out; where only the last layer's `down_proj` is trained, run the small LM once.

        Args:
            dtype: of matrix products, float32 or bfloat16.
            at_once: records in one pass.
        """
        self._small, self._dtype, self._at_once = small, dtype, at_once
        device = small.device
        causal: Any = small.model.get_base_model()
        self._backbone, self._head = causal.model, causal.lm_head.weight.detach()
        self._head_lower = self._head.to(dtype)
        self._sampled: SampledHead | ClassDraw | None = None
        self._likely = torch.zeros(0, 0, dtype=torch.int64)
        self._layers = _trained_layers(small)
        self._bias_layer = head_bias_of(small.model)
        width = max(len(example.ids) for example in examples)
        ids = np.zeros((len(examples), width), dtype=np.int64)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = example.ids
        self._ids = torch.from_numpy(ids).to(device)
        self._loss_from = torch.tensor([example.loss_from for example in examples], device=device)
        self.rows = torch.tensor([len(example.ids) - example.loss_from for example in examples], device=device)
        last = len(self._backbone.layers) - 1
        names = [name for name in small.trained_names if not name.endswith(PARAMETER)]
        self._through = all(f".layers.{last}.mlp.down_proj." in name for name in names)
        self._kept = self._run_below() if self._through else None

    def sum(
        self,
        chosen: npt.NDArray[np.int64],
        *,
        clip_norm: float,
        positions: int | None,
        classes: int | None = None,
        generator: torch.Generator,
    ) -> tuple[Vector, Vector]:
        """Sum of the chosen records' gradients, each clipped; and their norms before that.

        Args:
            clip_norm: inf does not clip.
            positions: at most so many of a record's loss tokens count, uniformly drawn anew; None for all.
            classes: of a sampled softmax, drawn anew for every pass, as clients do for every step; None for all.
            generator: of the draws, on the small LM's device.

        Returns: float64 `[d]`, in the order of `SmallLM.adapter_vector`; float64 `[chosen]`.
        """
        sums = [torch.zeros(p.numel(), dtype=torch.float64, device=p.device) for p in self._small.trainable]
        norms = []
        for start in range(0, len(chosen), self._at_once):
            records = torch.from_numpy(chosen[start : start + self._at_once]).to(self._small.device)
            self._sampled = self._sampled_head(classes, generator)
            gradients = self._gradients(records, *self._drawn(records, positions, generator))
            norm = torch.stack([gradient.double().square().sum(1) for gradient in gradients]).sum(0).sqrt()
            scales = (clip_norm / norm.clamp(min=1e-30)).clamp(max=1.0).float()
            for total, gradient in zip(sums, gradients, strict=True):
                total += scales @ gradient
            norms.append(norm)
        return torch.cat(sums).cpu().numpy(), (torch.cat(norms).cpu().numpy() if norms else np.zeros(0))

    @torch.no_grad()
    def logits(self, records: Sequence[int]) -> Tensor:
        """Logits of every token with loss, record after record, in float32: `[tokens, v]`."""
        index = torch.tensor(list(records), device=self._small.device)
        rows, counted = self._drawn(index, None, None)
        judged = self._judged(index, rows, torch.float32)[counted]
        logits = judged @ self._head.T
        return logits if self._bias is None else logits + self._bias

    @property
    def _bias(self) -> Tensor | None:
        return None if self._bias_layer is None else self._bias_layer.bias.detach()

    def texts(self, chosen: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Token ids `[n, width]`, padded with zeros, and the token after each position, -100 where it has no loss."""
        index = torch.from_numpy(chosen).to(self._small.device)
        ids, after = self._ids[index], torch.arange(self._ids.shape[1], device=self._ids.device)
        first = self._loss_from[index][:, None]
        judged = (after + 1 >= first) & (after + 1 < first + self.rows[index][:, None])
        return ids, ids.roll(-1, dims=1).masked_fill(~judged, -100)

    def _drawn(
        self, records: Tensor, positions: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Rows `[n, T]` (row i predicts position `loss_from + i`), and which of them count, `[n, T]`."""
        available = self.rows[records]
        most = int(available.max())
        rows = torch.arange(most, device=available.device).expand(len(records), -1)
        counted = rows < available[:, None]
        if positions is None or positions >= most:
            return rows, counted
        keys = torch.rand(counted.shape, generator=generator, device=counted.device).masked_fill(~counted, 2.0)
        rows = keys.topk(positions, dim=1, largest=False).indices
        return rows, rows < available[:, None]

    def _gradients(self, records: Tensor, rows: Tensor, counted: Tensor) -> list[Tensor]:
        """Per-record gradients by `SmallLM.adapter_vector`'s entries, float32 `[n, entries]` of each parameter."""
        positions = self._loss_from[records][:, None] + rows
        targets = self._ids[records].gather(1, positions.clamp(max=self._ids.shape[1] - 1))
        with _watched(self._layers) as gradients:
            judged = self._judged(records, rows, self._dtype)
            weights = counted / counted.sum(1, keepdim=True)
            if isinstance(self._sampled, ClassDraw):
                by_judged, by_bias = self._own_head_gradient(self._sampled, records, judged.detach(), targets, counted)
            else:
                by_judged, by_bias = self._head_gradient(judged.detach(), targets, weights)
            torch.autograd.backward(judged, by_judged)
            parts = [gradients[index] for index in range(len(self._layers))]
        # The head's name comes before the layers'.
        return self._small.in_units(parts if by_bias is None else [by_bias, *parts])

    def _judged(self, records: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What the head reads at the rows, float32 `[n, T, width]`."""
        if self._kept is not None:
            below, inputs = (kept[records[:, None], rows].float() for kept in self._kept)
            adapted = self._backbone.layers[-1].mlp.down_proj
            adapter = adapted.active_adapters[0]
            hidden: Tensor = self._backbone.norm(below + adapted.lora_B[adapter](inputs) * adapted.scaling[adapter])
            return hidden
        ids = self._ids[records]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = self._backbone(input_ids=ids, use_cache=False).last_hidden_state
        at = (self._loss_from[records] - 1)[:, None] + rows
        return hidden.gather(1, at.clamp(max=ids.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])).float()

    def _sampled_head(self, classes: int | None, generator: torch.Generator) -> SampledHead | ClassDraw | None:
        if classes is None:
            return None
        key = torch.randint(256, (16,), generator=generator, device=generator.device).tolist()
        drawn = self._small.output_classes(classes, key=bytes(key))
        if isinstance(drawn, ClassDraw):
            if self._likely.shape[1] != drawn.own:
                self._likely = self._likely_classes(drawn.own)
            return drawn
        return None if drawn is None else SampledHead.of(self._head_lower, drawn)

    @torch.no_grad()
    def _likely_classes(self, count: int) -> Tensor:
        """Each record's own classes, int64 `[records, count]`, by the activations that no adapter has moved."""
        if self._kept is None:
            raise DataError("classes by the record need activations that no adapter has moved")
        chosen = []
        for record, rows in enumerate(self.rows.tolist()):
            hidden = self._backbone.norm(self._kept[0][record, :rows].float())
            first = int(self._loss_from[record])
            targets = self._ids[record, first : first + rows]
            chosen.append(likely_classes(hidden, self._head_lower, targets, count))
        return torch.stack(chosen)

    def _own_head_gradient(
        self, draw: ClassDraw, records: Tensor, judged: Tensor, targets: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What `_head_gradient` gives, where each record has classes of its own: one record at a time."""
        gradient = torch.zeros_like(judged)
        by_bias = None if self._bias is None else judged.new_zeros(len(judged), len(self._bias))
        for index, record in enumerate(records.tolist()):
            rows = counted[index]
            hidden = judged[index, rows].requires_grad_()
            bias = None if self._bias is None else self._bias.clone().requires_grad_()
            sampled = SampledHead.of(self._head_lower, draw.with_own(self._likely[record]))
            loss = head_loss(hidden, self._head_lower, targets[index, rows], sampled, bias)
            gradient[index, rows], *of_bias = torch.autograd.grad(loss, [hidden] if bias is None else [hidden, bias])
            if by_bias is not None:
                (by_bias[index],) = of_bias
        return gradient, by_bias

    @torch.no_grad()
    def _head_gradient(self, judged: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of each record's weighted loss at the head's input, `[n, T, width]`, and by its bias, `[n, v]`."""
        gradient, by_bias = torch.empty_like(judged), None
        if self._bias is not None:
            by_bias = judged.new_zeros(len(judged), len(self._bias))
        at_once = max(1, _HEAD_ROWS // judged.shape[1])
        for start in range(0, len(judged), at_once):
            part = slice(start, start + at_once)
            rows, target = judged[part].flatten(0, 1), targets[part].flatten()
            logits, classes = self._logits(rows, target)
            weight = weights[part].flatten()[:, None]
            # The last column is each row's own class, where the softmax is over some classes.
            difference = torch.softmax(logits, dim=1).mul_(weight)
            if classes is None:
                difference.scatter_add_(1, target[:, None], -weight)
                moved = (difference.to(self._dtype) @ self._head_lower).float()
            else:
                difference[:, -1:] -= weight
                moved = (difference[:, :-1].to(self._dtype) @ classes.weight).float()
                moved += difference[:, -1:] * self._head[target]
            gradient[part] = moved.view_as(gradient[part])
            if by_bias is not None:
                by_record = difference.view(*targets[part].shape, -1)
                if classes is None:
                    by_bias[part] = by_record.sum(1)
                else:
                    by_bias[part, classes.rows] = by_record[..., :-1].sum(1)
                    by_bias[part] = by_bias[part].scatter_add(1, targets[part], by_record[..., -1])
        return gradient, by_bias

    def _logits(self, rows: Tensor, target: Tensor) -> tuple[Tensor, SampledHead | None]:
        """Of all classes, `[rows, v]`, or of the step's and each row's own, `[rows, classes + 1]`."""
        sampled, bias = self._sampled, self._bias
        if not isinstance(sampled, SampledHead):
            logits = (rows.to(self._dtype) @ self._head_lower.T).float()
            return (logits if bias is None else logits + bias), None
        logits = (rows.to(self._dtype) @ sampled.weight.T).float() + sampled.log_weights
        own = (rows * self._head[target]).sum(1)
        if bias is not None:
            logits += bias[sampled.rows]
            own = own + bias[target]
        places = sampled.places[target]
        held = places >= 0
        logits[held, places[held]] = -torch.inf
        return torch.cat([logits, own[:, None]], dim=1), sampled

    @torch.no_grad()
    def _run_below(self) -> tuple[Tensor, Tensor]:
        """The last layer's output without its adapter, and the adapter's inputs, at the rows: `[records, T, ...]`."""
        (layer,) = self._layers
        most = int(self.rows.max())
        at = (self._loss_from - 1)[:, None] + torch.arange(most, device=self.rows.device)
        at = at.clamp(max=self._ids.shape[1] - 1)
        seen: list[Tensor] = []

        def without_adapter(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            seen.append(inputs[0])
            return torch.zeros_like(output)

        kept: tuple[list[Tensor], list[Tensor]] = [], []
        watch = layer.register_forward_hook(without_adapter)
        below = self._backbone.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            for start in range(0, len(self._ids), _LOWER_HALF_RECORDS):
                part = slice(start, start + _LOWER_HALF_RECORDS)
                with torch.autocast(at.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
                    self._backbone(input_ids=self._ids[part], use_cache=False)
                for values, place in zip((seen[1], seen[0]), kept, strict=True):
                    index = at[part][..., None].expand(-1, -1, values.shape[2])
                    place.append(values.gather(1, index).to(self._dtype))
                seen.clear()
        finally:
            watch.remove()
            below.remove()
        return torch.cat(kept[0]), torch.cat(kept[1])


@contextmanager
def _watched(layers: Sequence[nn.Linear]) -> Iterator[dict[int, Tensor]]:
    """Per-record gradients of the layers' weights in one backward pass (`privacy.bookkeeping`)."""
    gradients: dict[int, Tensor] = {}

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def on_forward(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()

            def on_backward(g: Tensor) -> None:
                gradients[index] = torch.bmm(g.transpose(1, 2).float(), x.float())

            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(on_backward)

        return on_forward

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    for layer in layers:
        layer.weight.requires_grad_(False)
    try:
        yield gradients
    finally:
        for hook, layer in zip(hooks, layers, strict=True):
            hook.remove()
            layer.weight.requires_grad_(True)


def _trained_layers(small: SmallLM) -> list[nn.Linear]:
    owners = {id(module.weight): module for module in small.model.modules() if isinstance(module, nn.Linear)}
    named = zip(small.trained_names, small.trainable, strict=True)
    return [owners[id(parameter)] for name, parameter in named if not name.endswith(PARAMETER)]
