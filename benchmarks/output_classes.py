"""What a sampled softmax keeps of the whole head's gradient, and what a record costs with it.

    python benchmarks/output_classes.py                              # an untrained adapter, 100 records of chat
    python benchmarks/output_classes.py --run runs/NAME --json       # the adapter that a run has reached too

Each way to choose a step's classes (`training.output_classes_by`) and each number of them, with the recipe's adapter of
chat (the last `down_proj` at rank 256 and a bias of the head's classes), all positions. Gradients are the product's own
(`privacy.clipped_sum`). "Record": cosine of a record's gradient with that of the whole head, mean and tenth percentile.
"Sum": the same of the sum of gradients made equally long, as clipped ones are; it is what the server would see without
noise, and a choice of classes that is wrong in the same way for all records is seen there alone. "Length": of that sum,
over the whole head's. Milliseconds are processor time of one thread and of one record, in steps of nine as a client of
chat's recipe takes them, all ways in turn: where its activations are kept, and what a first look costs more, of which
the classes are a part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from utility_data import NAMES, data_settings
from utility_recipe import Recipe

from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.config import ClassesBy, RunConfig, build, overlay
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.records import Record
from fedpt_secure.errors import DataError, FedptError
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation.prepared_text import large_examples
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SmallExample, clipped_sum
from fedpt_secure.progress import SILENT

ADAPTER = Recipe.of("chat", 8.0).settings()["lora"]
COUNTS: dict[ClassesBy, tuple[int, ...]] = {"frequency": (1024, 2048, 4096), "record": (384, 768, 1024, 1536)}
STEP, UNCLIPPED = 9, 1e3
Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Kept:
    """What a way of choosing classes has given so far."""

    cosines: list[float] = field(default_factory=list)
    total: Vector | None = None
    first: float = 0.0
    again: float = 0.0
    """Processor seconds."""

    def add(self, vector: Vector, whole: Vector) -> None:
        """One record's gradient, and the whole head's."""
        unit = vector / np.linalg.norm(vector)
        self.cosines.append(float(unit @ whole / np.linalg.norm(whole)))
        self.total = unit if self.total is None else self.total + unit


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    quiet_libraries()
    try:
        results = measure(options)
    except FedptError as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        return error.exit_code
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    for adapter in dict.fromkeys(row["adapter"] for row in results):
        table = Table(title=f"{adapter}, {options.records} records of {options.data}")
        rows = [{k: v for k, v in row.items() if k != "adapter"} for row in results if row["adapter"] == adapter]
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        Console().print(table)
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each adapter, way and number of classes; the whole head first.

    Raises:
        FedptError: there are no such records, or the run has another adapter.
    """
    config = build(
        RunConfig,
        overlay(
            {"lora": ADAPTER, "models": {"device": "cpu", "activation_cache_mb": 4000}},
            {"data": data_settings(options.data, options.data_folder), "training": {"output_classes": 3}},
        ),
    )
    by_record = build(
        RunConfig, overlay(config.model_dump(exclude_none=True), {"training": {"output_classes_by": "record"}})
    )
    trained = {} if options.run is None else {"trained": reached(options.run)}
    chosen = records(config, options.records)
    models = {
        way: load_training_models(settings, cache=Cache(), progress=SILENT)
        for way, settings in (("frequency", config), ("record", by_record))
    }
    smalls: dict[ClassesBy, SmallLM] = {way: loaded.small for way, loaded in models.items()}
    cut = large_examples(chosen, models["record"], config)
    token_map = smalls["record"].token_map
    examples = [SmallExample(tuple(token_map.to_small(one.ids)), one.loss_from) for one in cut]
    results = []
    adapters = {"untrained": np.zeros(smalls["record"].dimension, dtype=np.float32), **trained}
    for name, vector in adapters.items():
        for small in smalls.values():
            small.load_adapter_vector(vector)
        results += [{"adapter": name, **row} for row in compared(smalls, examples, options.counts)]
    return results


def compared(
    smalls: dict[ClassesBy, SmallLM], examples: Sequence[SmallExample], counts: dict[ClassesBy, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """All ways and numbers of classes on the same records."""
    ways: dict[tuple[ClassesBy, int | None], Kept] = {("frequency", None): Kept()}
    ways.update({(by, count): Kept() for by, numbers in counts.items() for count in numbers})
    rng = np.random.default_rng(0)  # of public classes, in a benchmark
    for start in range(0, len(examples), STEP):
        step = examples[start : start + STEP]
        whole: list[Vector] = []
        for (by, count), kept in ways.items():
            small = smalls[by]
            classes = small.output_classes(count, key=rng.bytes(16))
            for example in step:
                small.forget(example.ids, example.loss_from)
            began = time.process_time()
            clipped_sum(small, step, clip_norm=UNCLIPPED, classes=classes)
            between = time.process_time()
            clipped_sum(small, step, clip_norm=UNCLIPPED, classes=classes)
            kept.first, kept.again = kept.first + between - began, kept.again + time.process_time() - between
            vectors = [clipped_sum(small, [one], clip_norm=UNCLIPPED, classes=classes).vector for one in step]
            whole = whole or vectors
            for vector, reference in zip(vectors, whole, strict=True):
                kept.add(vector, reference)
    reference = next(iter(ways.values()))
    return [_row(by, count, kept, reference, len(examples)) for (by, count), kept in ways.items()]


def _row(by: ClassesBy, count: int | None, kept: Kept, whole: Kept, records: int) -> dict[str, Any]:
    if kept.total is None or whole.total is None:
        raise DataError("no records to measure")
    lengths = np.linalg.norm(kept.total), np.linalg.norm(whole.total)
    return {
        "classes": count or "all",
        "by": by if count else "",
        "record": float(np.mean(kept.cosines)),
        "record, 10 %": float(np.quantile(kept.cosines, 0.1)),
        "sum": float(kept.total @ whole.total / lengths[0] / lengths[1]),
        "length": float(lengths[0] / lengths[1]),
        "ms": 1e3 * kept.again / records,
        "first": 1e3 * (kept.first - kept.again) / records,
    }


def records(config: RunConfig, count: int) -> list[Record]:
    """Training records, one of each client and then another.

    Raises:
        DataError: there are not so many.
    """
    clients = load_federated_text(config.data, seed=config.seed, cache=Cache(), progress=SILENT).clients
    most = max(len(client.train) for client in clients)
    in_turn = [client.train[place] for place in range(most) for client in clients if place < len(client.train)]
    if len(in_turn) < count:
        raise DataError(f"--records {count}, and the data have {len(in_turn)} to train on")
    return in_turn[:count]


def reached(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The adapter that a run would release now.

    Raises:
        FedptError: there is no such run, or it has no checkpoint.
    """
    directory = RunDirectory.open(path)
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        raise DataError(f"{path} has no checkpoint yet")
    return released_adapter(checkpoint, directory.config())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=NAMES, default="chat")
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--run", type=Path, help="a run with the recipe's adapter of chat under noise")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.records < 1:
        parser.error("--records must be at least 1")
    options.counts = COUNTS
    return options


if __name__ == "__main__":
    sys.exit(main())
