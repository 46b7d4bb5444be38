"""What each way to save work saves (precision, kept activations, sampled positions and classes); what a head costs.

Every row sums the clipped gradients of the same examples, one example a pass. Processor time, interleaved: all rows in
every repetition, each time in another order; a ratio is the median over repetitions of the first row's time over this
one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from dp_training_cases import CLIP_NORM, Case, build, make_examples
from dp_training_measure import peak_of
from torch.nn.functional import cross_entropy

from fedpt_secure.lm.head_loss import SampledHead, head_loss
from fedpt_secure.lm.output_classes import OutputClasses, draw_classes
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.split import SplitLM, split_model
from fedpt_secure.lm.training_compute import TrainingCompute
from fedpt_secure.privacy import SampledPositions, SmallExample, clipped_sum

CACHE_BYTES = 1 << 30
VOCABULARIES = (16_384, 49_152)
"""The built-in proxy's words, and those of the tokenizer it was trimmed from."""
SAMPLED = 16
CLASSES = 2048
"""Of a sampled softmax."""


@dataclass(frozen=True, slots=True)
class Saving:
    """One way to compute gradients.

    Attributes:
        whole: the whole model runs for every example, and the head at every position.
    """

    name: str
    dtype: torch.dtype = torch.float32
    kept: bool = False
    positions: int | None = None
    classes: int | None = None
    whole: bool = False


SAVINGS = (
    Saving("whole model, float32", whole=True),
    Saving("whole model, bfloat16 autocast", torch.bfloat16, whole=True),
    Saving("head at positions with loss, float32"),
    Saving("+ bfloat16", torch.bfloat16),
    Saving("+ kept activations", kept=True),
    Saving("+ 16 positions", positions=16),
    Saving("+ kept, bfloat16 (default)", torch.bfloat16, kept=True),
    Saving("+ kept, 16 positions", kept=True, positions=16),
    Saving("+ kept, bfloat16, 32 positions", torch.bfloat16, kept=True, positions=32),
    Saving("+ kept, bfloat16, 16 positions", torch.bfloat16, kept=True, positions=16),
    Saving("+ kept, bfloat16, 8 positions", torch.bfloat16, kept=True, positions=8),
    Saving(f"+ kept, bfloat16, {CLASSES:,} classes", torch.bfloat16, kept=True, classes=CLASSES),
    Saving(
        f"+ kept, bfloat16, 32 positions, {CLASSES:,} classes", torch.bfloat16, kept=True, positions=32, classes=CLASSES
    ),
)


def measure_savings(case: Case, on_repetition: Callable[[], None]) -> dict[str, Any]:
    """All rows for one case, as the JSON that the benchmark prints."""
    small = build(case)
    examples = make_examples(case, small)
    tokens = sum(len(example.ids) for example in examples)
    splits = {row.name: _split(small, row) for row in SAVINGS}
    exact, errors = _run(small, examples, SAVINGS[0], splits[SAVINGS[0].name]), {}
    for row in SAVINGS:
        if row.positions is None and row.classes is None:  # another loss otherwise
            found = _run(small, examples, row, splits[row.name])
            errors[row.name] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        else:
            _run(small, examples, row, splits[row.name])
    seconds: dict[str, list[float]] = {row.name: [] for row in SAVINGS}
    order = np.random.default_rng(2)
    for _ in range(case.repetitions):
        for index in order.permutation(len(SAVINGS)):
            row = SAVINGS[index]
            began = time.process_time()
            _run(small, examples, row, splits[row.name])
            seconds[row.name].append(time.process_time() - began)
        on_repetition()
    first = np.array(seconds[SAVINGS[0].name])
    return {
        "case": case.name,
        "examples": len(examples),
        "tokens": tokens,
        "repetitions": case.repetitions,
        "rows": [
            {
                "name": row.name,
                "tokens_per_processor_second": tokens / float(np.median(seconds[row.name])),
                "ratio": float(np.median(first / np.array(seconds[row.name]))),
                "relative_error": errors.get(row.name),
                "kept_bytes": 0 if splits[row.name] is None else splits[row.name].cached_bytes,
            }
            for row in SAVINGS
        ],
    }


def measure_heads(*, positions: int, width: int, repetitions: int) -> list[dict[str, Any]]:
    """Loss and gradient at the head's input, by vocabulary: processor milliseconds, and bytes beyond the weights."""
    rows = []
    for vocabulary in VOCABULARIES:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, width, generator=generator) * 0.05
        low = weight.bfloat16()
        hidden = torch.randn(positions, width, generator=generator)
        targets = torch.randint(0, vocabulary, (positions,), generator=generator)
        few = hidden[:SAMPLED], targets[:SAMPLED]
        ways: dict[str, Callable[[], None]] = {
            "autograd, float32": partial(_autograd, hidden, weight, targets),
            "blocks, float32": partial(_blocks, hidden, weight, targets),
            "blocks, bfloat16": partial(_blocks, hidden, low, targets),
            f"blocks, {SAMPLED} positions, float32": partial(_blocks, few[0], weight, few[1]),
            f"blocks, {SAMPLED} positions, bfloat16": partial(_blocks, few[0], low, few[1]),
            f"blocks, {CLASSES:,} classes, bfloat16": partial(_sampled, hidden, low, targets),
            f"blocks, {SAMPLED} positions, {CLASSES:,} classes, bfloat16": partial(_sampled, few[0], low, few[1]),
        }
        for name, way in ways.items():
            way()
            seconds = []
            for _ in range(repetitions):
                began = time.process_time()
                way()
                seconds.append(time.process_time() - began)
            rows.append(
                {
                    "vocabulary": vocabulary,
                    "way": name,
                    "milliseconds": 1e3 * float(np.median(seconds)),
                    "working_bytes": peak_of(way),
                }
            )
    return rows


def savings_markdown(results: dict[str, Any]) -> str:
    """The tables for docs/dp_training.md."""
    lines = []
    for case in results["savings"]:
        lines += [
            f"{case['case']}: {case['examples']} examples, {case['tokens']} tokens, {case['repetitions']} repetitions.",
            "",
            "| gradients | tokens per processor second | ratio | kept, MB | off by |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in case["rows"]:
            error = "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            lines.append(
                f"| {row['name']} | {row['tokens_per_processor_second']:,.0f} | {row['ratio']:.2f} "
                f"| {row['kept_bytes'] / 1e6:.1f} | {error} |"
            )
        lines.append("")
    lines += ["| vocabulary | head | ms | working, MB |", "| ---: | --- | ---: | ---: |"]
    for row in results["heads"]:
        working = "-" if row["working_bytes"] is None else f"{row['working_bytes'] / 1e6:.1f}"
        lines.append(f"| {row['vocabulary']:,} | {row['way']} | {row['milliseconds']:.1f} | {working} |")
    return "\n".join(lines)


def shortened(case: Case, examples: int | None, repetitions: int | None) -> Case:
    """The case with fewer examples or repetitions."""
    return replace(case, examples=examples or case.examples, repetitions=repetitions or case.repetitions)


def _split(small: SmallLM, row: Saving) -> SplitLM | None:
    if row.whole:
        return None
    compute = TrainingCompute(row.dtype, CACHE_BYTES if row.kept else 0)
    return split_model(small.model, small.trained_names, compute)


def _run(small: SmallLM, examples: Sequence[SmallExample], row: Saving, split: SplitLM | None) -> Any:
    small.compute, small.split = TrainingCompute(row.dtype), split
    positions = None if row.positions is None else SampledPositions(row.positions, bytes(16))
    classes = None if row.classes is None else _draw(small.token_map.small_vocabulary_size, row.classes)
    return clipped_sum(small, examples, clip_norm=CLIP_NORM, positions=positions, classes=classes).vector


def _autograd(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    hidden = hidden.detach().requires_grad_()
    torch.autograd.grad(cross_entropy(hidden @ weight.T, targets), hidden)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    hidden = hidden.detach().requires_grad_()
    torch.autograd.grad(head_loss(hidden, weight, targets), hidden)


def _sampled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """The gathering of the classes included, which a step does once for all its examples."""
    hidden = hidden.detach().requires_grad_()
    head = SampledHead.of(weight, _draw(len(weight), CLASSES))
    torch.autograd.grad(head_loss(hidden, weight, targets, head), hidden)


def _draw(vocabulary: int, count: int) -> OutputClasses:
    return draw_classes(np.arange(vocabulary), count, key=bytes(16))
