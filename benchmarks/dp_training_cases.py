"""What is trained (models, adapters, examples) and the ways to sum its gradients that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpt_secure.config import LoraSettings
from fedpt_secure.lm.base import BUILTIN, builtin_directory, load_base
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.privacy import SmallExample, clipped_sum, example_loss, example_losses

CLIP_NORM = 0.1
SHORTEST = 16
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, slots=True)
class Case:
    """A model under an adapter, and how much of it is measured.

    Attributes:
        lora: changes to `LoraSettings`.
        path: folder of the weights; the built-in proxy if empty.
        examples: per repetition.
        longest: tokens of the longest example; lengths are uniform from `SHORTEST`.
    """

    name: str
    model: str
    examples: int
    repetitions: int
    lora: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    longest: int = 128
    device: str = "cpu"
    threads: int = 1


CASES = (
    Case("default", BUILTIN, examples=48, repetitions=9),
    Case("all_layers", BUILTIN, examples=24, repetitions=7, lora={"layers": 0, "modules": ["down_proj", *_ATTENTION]}),
    Case("smollm2", "large", examples=8, repetitions=5, lora={"rank": 8, "layers": 0, "modules": ["q_proj", "v_proj"]}),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to sum gradients: a method of `clipped_sum`, or none for non-private training."""

    method: str
    examples_per_pass: int

    @property
    def name(self) -> str:
        return f"{self.method} x{self.examples_per_pass}"


NON_PRIVATE = "non-private"
DEFAULT = Variant("bookkeeping", 1)


def variants(batch: int) -> list[Variant]:
    """All methods, each with one example per pass and with `batch`; non-private ones first."""
    methods = (NON_PRIVATE, "bookkeeping", "hooks", "ghost")
    return [Variant(method, size) for method in methods for size in sorted({1, batch})]


def build(case: Case) -> SmallLM:
    """The case's model with an adapter that is not zero, as after a few rounds."""
    torch.set_num_threads(case.threads)
    directory = Path(case.path) if case.path else builtin_directory()
    base = load_base(case.path or BUILTIN, Vocabulary.from_file(directory / "tokenizer.json"))
    lora = LoraSettings(**{**case.lora, "modules": tuple(case.lora.get("modules", ("down_proj",)))})
    small = SmallLM(base, lora, seed=0, device=torch.device(case.device))
    entries = np.random.default_rng(0).normal(0, 0.02, small.dimension)
    small.load_adapter_vector(entries.astype(np.float32))
    return small


def make_examples(case: Case, small: SmallLM) -> list[SmallExample]:
    """Uniformly random tokens, loss from the second on: the work does not depend on what they say."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(min(SHORTEST, case.longest), case.longest + 1, case.examples)
    lengths[0] = case.longest
    vocabulary = small.model.config.vocab_size
    return [SmallExample((0, *rng.integers(1, vocabulary, length - 1).tolist()), 1) for length in lengths]


def run(small: SmallLM, examples: Sequence[SmallExample], variant: Variant) -> None:
    """One step's sum of gradients."""
    if variant.method == NON_PRIVATE:
        for batch in passes(examples, variant.examples_per_pass):
            # One example by itself is computed as in private training: on the upper half, the head where there is loss.
            loss = example_loss(small, batch[0]) if len(batch) == 1 else example_losses(small, batch).sum()
            torch.autograd.backward(loss)
        torch.cat([parameter.grad.flatten() for parameter in small.trainable]).cpu()
        for parameter in small.trainable:
            parameter.grad = None
    else:
        sum_with(small, examples, variant)


def sum_with(small: SmallLM, examples: Sequence[SmallExample], variant: Variant):
    """The private variant's `ClippedSum`."""
    return clipped_sum(
        small,
        examples,
        clip_norm=CLIP_NORM,
        method=variant.method,  # type: ignore[arg-type]  # one of its methods, by `variants`
        examples_per_pass=variant.examples_per_pass,
    )


def passes(examples: Sequence[SmallExample], examples_per_pass: int) -> Iterator[list[SmallExample]]:
    """The same passes that `clipped_sum` makes: like lengths together."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), examples_per_pass):
        yield ordered[start : start + examples_per_pass]
