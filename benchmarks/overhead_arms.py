"""The ways to tune that are compared, and what one client's round costs in each: measured in a process of its own."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.crypto import client_bytes, secure_aggregation_parameters
from fedpt_secure.federation.announcement import PROTOCOL, Announcement
from fedpt_secure.lm.base import BUILTIN, BaseLM, builtin_directory, load_builtin_weights
from fedpt_secure.lm.directions import FILE as DIRECTIONS
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.training_compute import TrainingCompute, training_dtype
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.privacy import SampledPositions, SecureRandom, SmallExample, clipped_sum

CLIP_NORM = 0.1
CONTEXT = 128
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""SmolLM2-135M's published shape; the same as the default black box's `config.json`."""
ALL_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to tune.

    Attributes:
        model: `builtin`; or `shape`, a model of SmolLM2's shape with `layers_kept` layers and random weights: for
            costs, weights do not matter.
        lora: changes to `LoraSettings`; None trains every weight (record by record, clipped like the rest).
        positions: sampled loss tokens of a record; None for all.
        records: per measurement of time.
    """

    name: str
    label: str
    model: str
    records: int
    layers_kept: int = 30
    lora: dict[str, Any] | None = field(default_factory=dict)
    positions: int | None = None
    dtype: str = "auto"


ARMS: tuple[Arm, ...] = (
    Arm("fedpt_builtin", "FedPT, built-in proxy", BUILTIN, 16),
    Arm("fedpt_midsize", "FedPT, mid-size proxy (6 of SmolLM2's layers)", "shape", 8, layers_kept=6),
    Arm(
        "lora_large",
        "federated LoRA of the large model",
        "shape",
        3,
        lora={"layers": 0, "modules": ALL_MATRICES, "rank": 16},
    ),
    Arm("full_large", "federated full tuning of the large model", "shape", 2, lora=None),
)
"""The LoRA arm trains B of every matrix (A frozen, as FedPT here), at rank 16."""

CANDIDATES: tuple[Arm, ...] = tuple(
    Arm(
        f"rank{rank}_layers{layers}_positions{positions or 'all'}_{dtype}",
        "",
        BUILTIN,
        8,
        lora={"rank": rank, "layers": layers},
        positions=positions,
        dtype=dtype,
    )
    for rank, layers, positions, dtype in (
        (32, 6, None, "auto"),
        (32, 1, None, "auto"),
        (16, 1, None, "auto"),
        (32, 1, 32, "auto"),
        (32, 1, 32, "float32"),
        (8, 1, None, "auto"),
        (8, 1, 32, "auto"),
        (8, 1, 32, "float32"),
        (4, 1, 16, "auto"),
        (4, 1, 16, "float32"),
    )
)
"""What `fedpt-secure plan` chooses among, with the built-in proxy."""


def measure(arm: Arm) -> dict[str, Any]:
    """One client's costs per record and at their peak. Call it in a fresh process: memory is the process's.

    Returns:
        `trained_parameters`, `model_parameters`; per record of `CONTEXT` tokens `flops`, `seconds` (processor time, one
        thread), `wall_seconds`; `process_bytes`, the process's largest resident size, `imports_bytes`, what it had
        before a model was loaded, and `private_bytes`, the largest size less the files that are mapped into it
        (libraries' code), which the system may drop and read again; None where the system does not tell.
    """
    torch.set_num_threads(1)
    before = _peak()
    step, model_parameters, trained = _prepare(arm)
    rng = np.random.default_rng(1)
    records = [_record(rng, arm) for _ in range(arm.records)]
    step(records[:1])  # thread pools and scratch space are there from here on
    wall, processor = time.perf_counter(), time.process_time()
    step(records)
    seconds = (time.process_time() - processor) / arm.records
    wall_seconds = (time.perf_counter() - wall) / arm.records
    peak, mapped = _peak(), _mapped()
    with FlopCounterMode(display=False) as counter:
        step(records[:2])
    return {
        "name": arm.name,
        "label": arm.label,
        "trained_parameters": trained,
        "model_parameters": model_parameters,
        "flops_per_record": counter.get_total_flops() // 2,
        "seconds_per_record": seconds,
        "wall_seconds_per_record": wall_seconds,
        "process_bytes": peak,
        "imports_bytes": before,
        "private_bytes": None if mapped is None else peak - mapped,
    }


def _prepare(arm: Arm) -> tuple[Any, int, int]:
    if arm.lora is None:
        return _full_tuning(arm)
    base = _builtin() if arm.model == BUILTIN else _shape(arm.layers_kept)
    device = torch.device("cpu")
    compute = TrainingCompute(training_dtype(arm.dtype, device))
    small = SmallLM(base, LoraSettings(**arm.lora), seed=0, device=device, compute=compute)
    noise = SecureRandom()

    def step(records: Sequence[SmallExample]) -> None:
        positions = SampledPositions.draw(arm.positions, noise)
        clipped_sum(small, records, clip_norm=CLIP_NORM, positions=positions)

    weights = sum(p.numel() for name, p in small.model.named_parameters() if "lora_" not in name)
    return step, weights, small.dimension


def _full_tuning(arm: Arm) -> tuple[Any, int, int]:
    """Every weight in float32; one gradient a record, clipped and added up: what DP-SGD with the same unit needs."""
    model = _shape(arm.layers_kept).model
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]

    def step(records: Sequence[SmallExample]) -> None:
        for record in records:
            ids = torch.tensor([record.ids])
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]).backward()
            length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]))
            scale = float((CLIP_NORM / length).clamp(max=1.0))
            for parameter, sum_ in zip(parameters, total, strict=True):
                sum_.add_(parameter.grad, alpha=scale)
                parameter.grad = None

    count = sum(parameter.numel() for parameter in parameters)
    return step, count, count


def _builtin() -> BaseLM:
    directory = builtin_directory()
    model, token_map = load_builtin_weights(directory, Vocabulary.from_file(directory / "tokenizer.json"))
    return BaseLM(model, token_map, BUILTIN, Directions.load(directory / DIRECTIONS))


def _shape(layers: int) -> BaseLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMOLLM2 | {"num_hidden_layers": layers})))
    width = int(SMOLLM2["vocab_size"])
    return BaseLM(model, TokenMap(np.arange(width), width), f"SmolLM2's shape with {layers} layers")


def _record(rng: np.random.Generator, arm: Arm) -> SmallExample:
    """Random tokens, loss from the second on: the work does not depend on what they say."""
    return SmallExample((0, *rng.integers(1, 8000, CONTEXT - 1).tolist()), 1)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def _mapped() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024


def payload(trained_parameters: int, *, cohort: int) -> dict[str, Any]:
    """Bytes of one client's round, computed from the messages' own encoders: secure aggregation and the announcement.

    For vectors that a round could not carry (the announcement has a limit) it is still the length of what would be
    sent.
    """
    parameters = secure_aggregation_parameters(cohort, 0.1, 0.1)
    crypto = client_bytes(parameters, elements=trained_parameters, ring_bits=32)
    empty = Announcement(
        protocol=PROTOCOL,
        run_id=bytes(16),
        round_index=0,
        attempt=0,
        cohort=tuple(f"client-{index:06d}" for index in range(cohort)),
        threshold=parameters.threshold,
        minimum_survivors=parameters.minimum_survivors,
        ring_bits=32,
        config_digest=bytes(32),
        clip_norm=CLIP_NORM,
        adapter=b"",
    )
    announced = len(empty.to_bytes()) + 4 * trained_parameters + 3
    return {
        "up": crypto.total_up,
        "down": crypto.total_down + announced,
        "vector": 4 * trained_parameters,
        "secure_aggregation": crypto.total_up + crypto.total_down - 4 * trained_parameters,
    }
