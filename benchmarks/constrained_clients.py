"""What clients with few resources save, and what it costs: parts of the adapter against the whole of it.

    python benchmarks/constrained_clients.py                # some minutes of one core; the default chat has to be there
    python benchmarks/constrained_clients.py --memory       # seconds: memory and time of one example's gradient alone
    python benchmarks/constrained_clients.py --json         # the results; --markdown prints tables

Memory: bytes that autograd keeps for the backward pass of one example of 128 tokens, and resident bytes beyond those
before the pass (the kernel's high-water mark), for adapters on all matrices of all layers of the built-in model.
Utility: the same rounds with the same noise of the sum (central: one Gaussian), by what clients train: everything, a
block of one layer a round, the last layer alone, or tiers (half of the clients everything, half the last layer at rank
4). Losses are of the tuned small LM on held-out records; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from dp_training_cases import Case, build, make_examples
from dp_training_measure import conditions, peak_of

from fedpt_secure.config import RunConfig
from fedpt_secure.config import build as build_settings
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.examples import encode
from fedpt_secure.federation.server_optimizer import ServerOptimizer
from fedpt_secure.federation.setup import load_models
from fedpt_secure.federation.tiers import TrainingPlan
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import (
    SecureRandom,
    SmallExample,
    calibrate_noise,
    clipped_sum,
    example_loss,
    example_losses,
    sampled_gradient_sum,
)
from fedpt_secure.privacy.bookkeeping import bookkeeping_gradients
from fedpt_secure.progress import SILENT

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLIP_NORM, DELTA = 0.1, 1e-5
LAYERS = 6
"""Of the built-in proxy."""
PARTS = {
    "whole adapter": WHOLE,
    "block: last layer": TrainedPart(frozenset({LAYERS - 1})),
    "block: middle layer": TrainedPart(frozenset({LAYERS // 2})),
    "block: first layer": TrainedPart(frozenset({0})),
    "last layer, rank 4": TrainedPart(frozenset({LAYERS - 1}), 4),
}
ARMS = {
    "whole adapter": {},
    "a block of one layer a round": {"training": {"layers_per_round": 1}},
    "last layer alone": {"federation": {"tiers": [{"name": "all", "share": 1.0, "layers": 1}]}},
    "tiers": {
        "federation": {
            "tiers": [
                {"name": "laptop", "share": 0.5},
                {"name": "phone", "share": 0.5, "layers": 1, "rank": 4},
            ]
        }
    },
}


def measure_memory(repetitions: int) -> list[dict]:
    """Of one example's gradient, by part."""
    case = Case(
        "all", "builtin", examples=1, repetitions=repetitions, lora={"layers": 0, "rank": 16, "modules": MODULES}
    )
    small = build(case)
    (example,) = make_examples(case, small)
    for part in PARTS.values():  # what is made once
        clipped_sum(small, [example], clip_norm=CLIP_NORM, part=part)
    seconds = {name: [] for name in PARTS}
    for _ in range(repetitions):
        for name, part in PARTS.items():
            began = time.process_time()
            clipped_sum(small, [example], clip_norm=CLIP_NORM, part=part)
            seconds[name].append(time.process_time() - began)
    return [
        {
            "part": name,
            "entries": int(small.coordinates(part).sum()),
            "kept_for_backward_bytes": kept_for_backward(small, example, part),
            "working_bytes": peak_of(lambda part=part: clipped_sum(small, [example], clip_norm=CLIP_NORM, part=part)),
            "milliseconds": 1e3 * float(np.median(seconds[name])),
        }
        for name, part in PARTS.items()
    ]


def kept_for_backward(small: SmallLM, example: SmallExample, part: TrainedPart) -> int:
    """Bytes of distinct tensors that autograd keeps, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in small.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with bookkeeping_gradients(small, part=part), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = example_loss(small, example, part=part)
    del loss
    return sum(kept.values())


def measure_utility(options: argparse.Namespace) -> dict:
    """Held-out loss after the last round, by arm and epsilon."""
    config = build_settings(RunConfig, {"lora": {"layers": 0, "rank": 16, "modules": MODULES}})
    text = load_federated_text(config.data, seed=0, cache=Cache(), progress=SILENT)
    models = load_models(config.for_population(len(text.clients)), cache=Cache(), progress=SILENT)
    small = models.small

    def examples(records: Sequence) -> list[SmallExample]:
        encoded = (encode(record, models.tokenizer, context_length=128) for record in records)
        return [SmallExample(tuple(small.token_map.to_small(item.ids)), item.loss_from) for item in encoded]

    clients = sorted(text.clients, key=lambda client: (-len(client.train), client.client_id))[: options.clients]
    train = {client.client_id: examples(client.train) for client in clients}
    held_out = examples([record for client in clients for record in client.held_out])[: options.held_out]
    results: dict = {"records": sum(map(len, train.values())), "start": _loss(small, held_out), "losses": {}}
    for epsilon in (float("inf"), options.epsilon):
        sigma = 0.0
        if np.isfinite(epsilon):
            sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=options.rate, steps=options.rounds)
        for name, changes in ARMS.items():
            settings = build_settings(RunConfig, {"lora": {"layers": 0, "rank": 16, "modules": MODULES}, **changes})
            plan = TrainingPlan.of(settings, list(train), small.adapted_layers)
            began = time.process_time()
            loss = _train(small, train, held_out, plan, sigma, options)
            entry = {"loss": loss, "processor_seconds": time.process_time() - began}
            results["losses"].setdefault(f"{epsilon:g}", {})[name] = entry
            print(f"epsilon {epsilon:g}, {name}: {loss:.4f}", file=sys.stderr, flush=True)
    return results


def _train(small, train, held_out, plan, sigma, options) -> float:
    adapter = np.zeros(small.dimension, dtype=np.float32)
    optimizer = ServerOptimizer.fresh(
        "adam", learning_rate=options.learning_rate, momentum=0.9, dimension=small.dimension
    )
    noise = SecureRandom()
    for round_index in range(options.rounds):
        small.load_adapter_vector(adapter)
        total = np.zeros(small.dimension)
        for client, records in train.items():
            total += sampled_gradient_sum(
                small,
                records,
                sampling_rate=options.rate,
                clip_norm=CLIP_NORM,
                noise=noise,
                part=plan.part(client, round_index),
            )
        total += noise.gaussian(small.dimension, standard_deviation=sigma)
        counts = plan.contributors(small, list(train), round_index)
        trained = None if counts is None else counts > 0
        counts = np.full(small.dimension, len(train)) if counts is None else np.maximum(counts, 1)
        adapter, optimizer = optimizer.apply(adapter, -total / counts, trained=trained)
    small.load_adapter_vector(adapter)
    loss = _loss(small, held_out)
    small.load_adapter_vector(np.zeros(small.dimension, dtype=np.float32))
    return loss


def _loss(small: SmallLM, held_out: Sequence[SmallExample]) -> float:
    with torch.inference_mode():
        return float(torch.stack([example_losses(small, [example])[0] for example in held_out]).mean())


def markdown(results: dict) -> str:
    """The tables for docs/constrained_clients.md."""
    lines = [
        "| trained | entries | kept for the backward pass, MB | working, MB | ms of one example |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["memory"]:
        working = "-" if row["working_bytes"] is None else f"{row['working_bytes'] / 1e6:.1f}"
        lines.append(
            f"| {row['part']} | {row['entries']:,} | {row['kept_for_backward_bytes'] / 1e6:.1f} | {working} "
            f"| {row['milliseconds']:.0f} |"
        )
    if "utility" in results:
        losses = results["utility"]["losses"]
        lines += ["", "| trained | " + " | ".join(f"loss at epsilon {epsilon}" for epsilon in losses) + " |"]
        lines += ["| --- |" + " ---: |" * len(losses)]
        lines += [
            f"| {name} | " + " | ".join(f"{arms[name]['loss']:.4f}" for arms in losses.values()) + " |" for name in ARMS
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory and time alone")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.06)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=0.006)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=7)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true")
    output.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {"conditions": conditions("cpu", 1), "memory": measure_memory(options.repetitions)}
    if not options.memory:
        settings = {name: getattr(options, name) for name in ("clients", "rounds", "rate", "learning_rate", "held_out")}
        results["utility"] = settings | measure_utility(options)
    print(json.dumps(results, indent=2) if options.json else markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
