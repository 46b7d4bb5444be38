"""FedPT's last step: the proxied large LM teaches the small one, on public text.

After a round the server holds a differentially private aggregate, the small LM tuned by it, and a black box. The
proxied large LM knows more than the small one; distilling it back gives the next round a better start (Gao et al.,
arXiv 2410.00362, step 5).

**Privacy.** What enters here is the aggregate, which is differentially private already, public text and the public
large model; no private record does. The step is post-processing and costs no budget. It would stop being so the moment
private data chose the text, the number of steps or whether to keep the result. The types help: text enters as
`PublicText`, which can be built from token ids and a named source only, and the steps are fixed before the first.

**Loss.** Per position, KL(teacher || small LM) over the small classes at a temperature T, times T^2 (Hinton et al.
2015, arXiv 1503.02531). The teacher is the proxied large LM *of the round's aggregate*, summed up over the small
classes: a mapped token keeps its probability, the unknown class has that of all tokens outside the map. Only the
parameters that federated training trains are changed, so the adapter stays one thing with one history.

The black box is asked once per text, whatever the number of rounds (`public_answers`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy.adapter_pair import AdapterPair, evaluating
from fedpt_secure.proxy.public_answers import PublicAnswers
from fedpt_secure.proxy.steering import SteeringRule, steered_classes

_HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class DistillationReport:
    """What a distillation did.

    Attributes:
        source: the public text's.
        steps: optimiser steps made.
        tokens: positions learned from, repeats counted.
        held_out_tokens: positions measured on, never learned from.
        divergence_before: KL(teacher || small LM) on the held-out positions at temperature 1, nats per position.
        divergence_after: the same after the last step.
    """

    source: str
    steps: int
    tokens: int
    held_out_tokens: int
    divergence_before: float
    divergence_after: float


def distil(
    model: PeftModel,
    answers: PublicAnswers,
    *,
    rule: SteeringRule,
    steps: int,
    learning_rate: float,
    temperature: float = 1.0,
    batch_sequences: int = 16,
    seed: int,
    progress: Progress = SILENT,
) -> DistillationReport:
    """Teach the small LM what its own proxied large LM says about public text. Changes the adapter in place.

    Guarantees: only trainable parameters change, and the same ones stay trainable; the same seed, adapter and answers
    give the same result on one machine; if anything fails, the adapter is as it was.

    Args:
        model: the small LM with the round's aggregate in its adapter; its trainable parameters are taught.
        answers: from `public_answers.ask_black_box`.
        rule: how the small LM steers the proxied model that teaches; a public text is a text from its first token on.
        steps: Adam steps, fixed beforehand.
        learning_rate: Adam's; the others of its constants are the usual ones.
        temperature: softens teacher and student while learning.
        batch_sequences: sequences a step.
        seed: chooses the held-out tenth and the order of the rest. The text is public, so this is no secret.
        progress: a bar that counts steps.

    Raises:
        ConfigError: a setting is out of its range.
        ModelError: the model has no trainable parameter, does not fit the token map, or diverges.
    """
    _check(steps=steps, learning_rate=learning_rate, temperature=temperature, batch=batch_sequences)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("the small LM has no trainable parameter to distil into")
    rng = np.random.default_rng([seed, 0x64697374])  # ASCII "dist": apart from other generators of the same seed
    held_out, schedule = _split(len(answers.small_ids), steps, batch_sequences, rng)
    teacher = _Teacher(model, answers, rule, [*held_out, *np.unique(schedule).tolist()])
    before = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.Adam(trainable, lr=learning_rate)
    try:
        divergence_before = _held_out_divergence(model, teacher, held_out)
        with progress.task("distillation", steps, unit="steps") as task, evaluating(model):
            for batch in schedule:
                optimizer.zero_grad(set_to_none=True)
                loss = _divergence(model, teacher, batch, temperature)
                if not bool(torch.isfinite(loss)):
                    raise _diverged()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                task.describe(f"{loss.item():.3f} nats")
                task.advance()
        divergence_after = _held_out_divergence(model, teacher, held_out)
        if not math.isfinite(divergence_after):
            raise _diverged()
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(trainable, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        # Federated training that follows must not find these gradients.
        optimizer.zero_grad(set_to_none=True)
    return DistillationReport(
        source=answers.source,
        steps=steps,
        tokens=sum(len(answers.small_ids[index]) for batch in schedule for index in batch),
        held_out_tokens=sum(len(answers.small_ids[index]) for index in held_out),
        divergence_before=divergence_before,
        divergence_after=divergence_after,
    )


class _Teacher:
    """The proxied large LM over the small classes, frozen at the adapter it was made with."""

    def __init__(self, model: PeftModel, answers: PublicAnswers, rule: SteeringRule, indices: Sequence[int]) -> None:
        self.ids = answers.small_ids
        self.width = answers.token_map.small_vocabulary_size
        self.logprobs: dict[int, Tensor] = {}
        # Sequences of similar length share a batch.
        ordered = sorted(indices, key=lambda index: -len(answers.small_ids[index]))
        pair = AdapterPair(model, answers.token_map)
        for index, (base, tuned) in zip(ordered, pair.score([self.ids[i] for i in ordered]), strict=True):
            classes = answers.classes(index, base.cpu())
            places = torch.arange(len(classes))
            proxied = steered_classes(classes, base.cpu(), tuned.cpu(), answers.token_map, rule, places)
            self.logprobs[index] = proxied.half()


def _divergence(model: PeftModel, teacher: _Teacher, batch: Sequence[int], temperature: float) -> Tensor:
    """Mean over the batch's positions of T^2 KL(teacher_T || student_T), in nats."""
    device = model.device
    longest = max(len(teacher.ids[index]) for index in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, index in enumerate(batch):
        length = len(teacher.ids[index])
        ids[row, :length] = torch.as_tensor(teacher.ids[index])
        mask[row, :length] = 1
    mask = mask.to(device)
    logits = model(input_ids=ids.to(device), attention_mask=mask, use_cache=False).logits
    student = torch.log_softmax(logits[mask.bool()][:, : teacher.width].float() / temperature, dim=-1)
    target = torch.cat([teacher.logprobs[index] for index in batch]).to(device).float()
    target = torch.log_softmax(target / temperature, dim=-1)
    # A class the API excludes has probability 0 and costs nothing; 0 * (-inf) would be NaN.
    terms = torch.where(torch.isneginf(target), 0.0, target.exp() * (target - student))
    return terms.sum() / len(target) * temperature**2


def _held_out_divergence(model: PeftModel, teacher: _Teacher, held_out: Sequence[int]) -> float:
    positions = [len(teacher.ids[index]) for index in held_out]
    with torch.no_grad(), evaluating(model):
        each = [float(_divergence(model, teacher, [index], 1.0)) for index in held_out]
    return math.fsum(length * value for length, value in zip(positions, each, strict=True)) / sum(positions)


def _split(
    sequences: int, steps: int, batch_sequences: int, rng: np.random.Generator
) -> tuple[list[int], list[list[int]]]:
    """The held-out sequences, and for each step those it learns from: epoch after epoch, each in a new order."""
    order = rng.permutation(sequences)
    held_out = max(1, round(sequences * _HELD_OUT_FRACTION))
    learned = order[held_out:]

    def stream() -> Iterator[int]:
        while True:
            yield from rng.permutation(learned).tolist()

    source = stream()
    batch = min(batch_sequences, len(learned))
    return sorted(order[:held_out].tolist()), [[next(source) for _ in range(batch)] for _ in range(steps)]


def _check(*, steps: int, learning_rate: float, temperature: float, batch: int) -> None:
    for name, value, rule, holds in (
        ("steps", steps, "at least 1", steps >= 1),
        ("learning_rate", learning_rate, "a finite positive number", 0 < learning_rate < math.inf),
        ("temperature", temperature, "a finite positive number", 0 < temperature < math.inf),
        ("batch_sequences", batch, "at least 1", batch >= 1),
    ):
        if not holds:
            raise ConfigError(f"distillation: {name} is {value}; it must be {rule}")


def _diverged() -> ModelError:
    return ModelError("distillation diverged; the adapter is as it was before", hint="lower the learning rate")
