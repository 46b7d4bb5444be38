"""Tuning the large model itself, centrally and without privacy: what proxy tuning is measured against.

Nobody could do this in the situation FedPT is for: it needs the large model's weights *and* everybody's text in one
place. It exists so that a report can say which share of that gain was reached without either.

Plain LoRA (Hu et al. 2021, arXiv 2106.09685; A and B, on every linear layer but the output) by AdamW, loss per judged
token as `held_out` measures it. The output layer is computed at judged positions only, its gradient formed together
with the logits and in chunks, so that a vocabulary of 49,152 costs neither the time of prompt positions nor gigabytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import Tensor

from fedpt_secure.config import Count, Positive, Seed, Settings
from fedpt_secure.data.examples import Example
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.errors import ModelError
from fedpt_secure.proxy import load_causal_lm

_POSITIONS_AT_ONCE = 2048
_HEAD_ROWS = 512
_GRADIENT_NORM = 1.0
_BATCHES_SORTED_TOGETHER = 32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DirectSettings(Settings):
    """How the large model is tuned directly. Fixed before the first step: no held-out record chooses any of it."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    scale: Positive = 2.0
    """Factor on the adapter's output (PEFT's `lora_alpha / r`)."""
    learning_rate: Positive = 1e-3
    batch_records: Count = 16
    epochs: Annotated[int, Field(ge=1, le=100)] = 1
    records: Count | None = None
    """Tune on no more than this many training records (a seeded sample); the ceiling is then lower than it could be."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the frozen model while tuning; what is trained, and all that is reported, is in float32."""
    seed: Seed = 0


class DirectTuning:
    """The large model under a LoRA adapter in training.

    Args:
        path: the model's directory.
        settings: of the adapter and its training.
        device: where it runs.

    Raises:
        ModelError: the model cannot be loaded, or LoRA does not fit it.
    """

    def __init__(self, path: Path, settings: DirectSettings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._dtype = _DTYPES[settings.dtype]
        base = load_causal_lm(path, self._dtype).to(device)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.scale * settings.rank,  # type: ignore[arg-type]  # PEFT divides it by the rank again
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # PEFT reads a name that Transformers deprecates.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                torch.manual_seed(settings.seed)
                self.model: PeftModel = get_peft_model(base, config)
        except ValueError as error:
            raise ModelError(f"LoRA does not fit the large model in {path}: {error}") from None
        self.model.train()
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._linear_head: bool | None = None

    @property
    def dimension(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def step(self, examples: Sequence[Example], learning_rate: float) -> float:
        """One AdamW step on the mean loss per judged token of a batch; returns that loss in nats.

        Raises:
            ModelError: the loss is not finite.
        """
        total = sum(len(example.ids) - example.loss_from for example in examples)
        if self._linear_head is None:
            self._linear_head = self._head_is_linear(examples[0])
        loss = 0.0
        for part in _parts(examples):
            part_loss = self._summed_loss(part) / total
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += float(part_loss.detach())
        if not math.isfinite(loss):
            raise ModelError("tuning the large model diverged", hint="a smaller learning rate")
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Adapter and optimizer, enough to go on from."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"value/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            KeyError, ValueError: it is of another adapter.
        """
        for name, parameter in self._parameters.items():
            found = {key: tensors[f"{key}/{name}"] for key in ("value", "step", "exp_avg", "exp_avg_sq")}
            if any(found[key].shape != parameter.shape for key in ("value", "exp_avg", "exp_avg_sq")):
                raise ValueError(f"{name} has another shape")
            with torch.no_grad():
                parameter.copy_(found["value"])
            self._optimizer.state[parameter] = {
                "step": found["step"].clone(),
                "exp_avg": found["exp_avg"].to(parameter),
                "exp_avg_sq": found["exp_avg_sq"].to(parameter),
            }

    def _summed_loss(self, examples: Sequence[Example]) -> Tensor:
        ids, mask, judged = padded(examples)
        targets = torch.cat([torch.tensor(example.ids[example.loss_from :]) for example in examples]).to(self._device)
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device), "use_cache": False}
        judged = judged.to(self._device)
        base: Any = self.model.get_base_model()
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            if not self._linear_head:
                logits = self.model(**inputs).logits[judged].float()
                return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            hidden = base.get_decoder()(**inputs).last_hidden_state[judged]
        return cast(Tensor, _FrozenHeadLoss.apply(hidden, base.get_output_embeddings().weight, targets))  # type: ignore[no-untyped-call]

    def _head_is_linear(self, example: Example) -> bool:
        """Whether logits are output weights times last hidden state: some models scale, cap or bias them."""
        base: Any = self.model.get_base_model()
        head = base.get_output_embeddings()
        if getattr(head, "bias", None) is not None or getattr(base.config, "final_logit_softcapping", None):
            return False
        ids = torch.tensor([example.ids[:8]], device=self._device)
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            parts = head(base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.to(self._dtype)).float()
        # Twice the rounding of bfloat16; a cap, which bends small logits by less, is asked for above.
        return bool((whole - parts).abs().max() <= 0.01 * whole.abs().max())


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy under a frozen output layer.

    hidden `[n, width]`, head `[V, width]`, targets int64 `[n]` -> scalar, in nats. The gradient for `hidden` is formed
    with the logits, so that these need not be kept or computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for first in range(0, len(hidden), _HEAD_ROWS):
            part = slice(first, first + _HEAD_ROWS)
            logits = (hidden[part].to(head.dtype) @ head.T).float()
            logits -= logits.logsumexp(dim=1, keepdim=True)
            own = targets[part, None]
            total -= logits.gather(1, own).sum().double().cpu()
            logits.exp_().scatter_add_(1, own, torch.full_like(own, -1.0, dtype=logits.dtype))
            gradient[part] = (logits.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total.to(hidden.device, torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids and attention mask, int64 `[rows, longest - 1]`, and judged positions, bool of that shape.

    The last token of a record is only ever predicted, so it is left out.
    """
    longest = max(len(example.ids) for example in examples) - 1
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    judged = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        read = len(example.ids) - 1
        ids[row, :read] = torch.tensor(example.ids[:-1])
        mask[row, :read] = 1
        judged[row, example.loss_from - 1 : read] = True
    return ids, mask, judged


def planned_batches(examples: Sequence[Example], settings: DirectSettings) -> list[list[int]]:
    """Which examples each step sees: epoch after epoch, records of like length together, batches in random order.

    The same for the same lengths and settings, so that a resumed training goes on where it stopped.
    """
    rng = simulation_rng("direct tuning", settings.seed)
    kept = rng.permutation(len(examples))[: settings.records]
    size = settings.batch_records
    plan: list[list[int]] = []
    for _ in range(settings.epochs):
        order = rng.permutation(kept)
        group = size * _BATCHES_SORTED_TOGETHER
        epoch = [
            batch
            for first in range(0, len(order), group)
            for batch in _by_length(order[first : first + group].tolist(), examples, size)
        ]
        plan.extend(epoch[index] for index in rng.permutation(len(epoch)))
    return plan


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises over the first twentieth of the steps, stays, and falls linearly to near 0 over the last third."""
    rise = (step + 1) / max(1.0, steps / 20)
    fall = (steps - step) / max(1.0, steps / 3)
    return peak * min(1.0, rise, fall)


def _by_length(indices: list[int], examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    ordered = sorted(indices, key=lambda index: len(examples[index].ids))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """The batch in pieces of a bounded number of padded positions."""
    longest = max(len(example.ids) for example in examples)
    size = max(1, _POSITIONS_AT_ONCE // longest)
    for first in range(0, len(examples), size):
        yield examples[first : first + size]
