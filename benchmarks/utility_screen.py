"""Settings side by side: what each is worth on the same records, paired over them.

    python benchmarks/utility_screen.py run --results screen.jsonl --name recipe --data chat --seed 1
    python benchmarks/utility_screen.py run --results screen.jsonl --data chat --seed 1 --set lora.rank=8
    python benchmarks/utility_screen.py table --results screen.jsonl

`run` is a run of `utility.py`, whose options it takes, without its ceiling; it appends one line with the losses per
record, and does nothing where the line is there. `table` compares every line with the first of the same data, epsilon,
seed and records: the difference of the proxied losses in nats per token, with a percentile bootstrap over records.

The interval holds for these two adapters. Training the same settings again, with other noise, moves the loss too: run a
setting twice under two names to see by how much.

To choose by such a table is to choose on its records. Use a seed whose records no reported figure is of: the seed
decides the split.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import utility
from rich.console import Console
from utility_ceiling import tokenizer_of
from utility_data import load_records
from utility_recipe import Recipe
from utility_results import append_line, epsilon_in_json, read_lines

from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.data import Cache
from fedpt_secure.errors import DataError, FedptError
from fedpt_secure.evaluation import bootstrap_rng
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.lm.large_weights import resolve_large
from fedpt_secure.progress import Progress

RESAMPLES = 5000
_SAME = ("data", "epsilon", "seed", "digest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a setting or print the table; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("what", choices=("run", "table"))
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--name", help="of the setting; default: its --set options")
    own, rest = command.parse_known_args(words)
    console = Console(stderr=True)
    try:
        if own.what == "table":
            if rest:
                command.error(f"table does not know {' '.join(rest)}")
            print(table(read_lines(own.results)))
            return 0
        options = utility.parse(rest)
        name = own.name or ", ".join(options.set) or "recipe"
        known = {(line["data"], line["epsilon"], line["seed"], line["name"]) for line in read_lines(own.results)}
        if (options.data, epsilon_in_json(options.epsilon), options.seed, name) in known:
            return 0
        torch.set_num_threads(options.threads)
        quiet_libraries()
        with shown_on(console) as progress:
            line = {"name": name, **run(options, progress)}
    except FedptError as error:
        console.print(f"error: {error}", markup=False)
        return error.exit_code
    append_line(own.results, line)
    return 0


def run(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train and judge one setting.

    Raises:
        FedptError: the run cannot be made.
    """
    began = time.process_time()
    config = utility.configuration(options)
    weights = resolve_large(config.models.large, cache=Cache(), progress=progress)
    records = load_records(
        config.data.model_dump(exclude_none=True),
        tokenizer_of(weights),
        seed=config.seed,
        evaluation_records=config.evaluation.records,
        context_length=config.models.context_length,
    )
    config = Recipe.of(options.data, options.epsilon).for_records(config, records, options.minutes)
    with tempfile.TemporaryDirectory() as temporary:
        result = run_training(
            config, RunDirectory.create(Path(temporary) / "run", config), cache=Cache(), progress=progress
        )
    evaluation = result.evaluation
    (proxied,) = evaluation.proxy_tuned.values()
    losses = {
        "large_base": evaluation.large_base,
        "small_base": evaluation.small_base,
        "small_tuned": evaluation.small_tuned,
        "proxy_tuned": proxied,
    }
    return {
        "data": options.data,
        "epsilon": epsilon_in_json(options.epsilon),
        "seed": options.seed,
        "digest": records.digest,
        "minutes": round((time.process_time() - began) / 60, 2),
        "set": options.set,
        "rounds": config.federation.rounds,
        "cohort": config.federation.cohort,
        "sampling_rate": config.privacy.sampling_rate,
        "trained_parameters": result.dimension,
        "tokens": evaluation.tokens.tolist(),
        "losses": {name: [round(float(value), 3) for value in sums] for name, sums in losses.items()},
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each line against the first of the same data, epsilon, seed and records.

    Raises:
        DataError: no lines.
    """
    if not lines:
        raise DataError("there are no results to compare", hint="utility_screen.py run --results FILE ...")
    first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    rows = [
        "| data, epsilon, seed | setting | d | CPU minutes | small tuned | proxied | gain | against the first |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in sorted(lines, key=lambda line: tuple(str(line[key]) for key in _SAME)):
        key = tuple(line[key] for key in _SAME)
        reference = first.setdefault(key, line)
        tokens = np.asarray(line["tokens"], dtype=np.float64)
        arms = {name: np.asarray(sums) for name, sums in line["losses"].items()}
        loss = {name: sums.sum() / tokens.sum() for name, sums in arms.items()}
        against = ""
        if line is not reference:
            value, low, high = difference(arms["proxy_tuned"], np.asarray(reference["losses"]["proxy_tuned"]), tokens)
            against = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append(
            f"| {line['data']}, {line['epsilon']}, {line['seed']} | {line['name']} | {line['trained_parameters']:,} | "
            f"{line['minutes']:.1f} | {loss['small_tuned']:.4f} | {loss['proxy_tuned']:.4f} | "
            f"{loss['large_base'] - loss['proxy_tuned']:.4f} | {against} |"
        )
    return "\n".join(rows)


def difference(
    losses: utility.Losses, reference: utility.Losses, tokens: utility.Losses, *, seed: int = 0
) -> tuple[float, float, float]:
    """Loss less the reference's, nats per token, and its 95 % interval over records.

    Args:
        losses, reference: `[records]`, sums of negative log-likelihoods over the same tokens.
        tokens: `[records]`, how many.
    """
    change = losses - reference
    drawn = bootstrap_rng(seed).integers(len(change), size=(RESAMPLES, len(change)))
    low, high = np.quantile(change[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975))
    return float(change.sum() / tokens.sum()), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
