"""How much of the gap to a directly tuned large model proxy tuning closes, at an epsilon, by the product's own path.

    python benchmarks/utility.py --data chat --epsilon 4 --json
    python benchmarks/utility.py --data medquad --epsilon inf --data-folder FOLDER --run runs/medquad
    fedpt-secure evaluate --run runs/medquad --responses 20      # ROUGE-L
    python benchmarks/utility.py --data chat --epsilon 4 --recompute-ceiling

One run of `run_training`: mode `distributed` under real secure aggregation, nothing simulated but that all clients are
in one process. The fraction of the gap is

    (loss of the large base - loss of the proxied large) / (loss of the large base - loss of the large tuned directly)

over the held-out records, in nats per token, with a percentile bootstrap over records, paired over all three. The
directly tuned model is that of `utility_ceiling.py`: without privacy, centrally, on so many records as `ceiling` says;
its losses per record stand in `ceilings.json` by the digest of the records, so that other records are never compared.

Settings are those of `utility_recipe.py`; `--set section.key=value` changes them. `minutes` is CPU time of all threads,
held-out evaluation included; `--minutes M` gives M / 30 of the recipe's rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from utility_ceiling import CEILINGS, EVALUATION_RECORDS, compute, find, tokenizer_of
from utility_data import NAMES, changed_by, data_settings, load_records
from utility_recipe import FULL_MINUTES, Recipe

from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.data import Cache
from fedpt_secure.errors import DataError, FedptError
from fedpt_secure.evaluation import bootstrap_rng
from fedpt_secure.federation import RunDirectory, RunResult, run_training
from fedpt_secure.lm.large_weights import resolve_large
from fedpt_secure.progress import Progress
from fedpt_secure.report import summarise

RESAMPLES = 5000
Losses = npt.NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    quiet_libraries()
    console = Console(stderr=True)
    try:
        with shown_on(console) as progress:
            result = measure(options, progress)
    except FedptError as error:
        console.print(f"error: {error}", markup=False)
        return error.exit_code
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        Console().print(_table(result))
    return 0


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train, judge, and compare with the ceiling.

    Raises:
        FedptError: the run cannot be made, or its records are not those of the ceiling.
    """
    began = time.process_time()
    config = configuration(options)
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
        path = options.run or Path(temporary) / "run"
        resumed = path.exists()
        directory = RunDirectory.open(path) if resumed else RunDirectory.create(path, config)
        if resumed:
            directory.require_settings(config.model_dump())
        result = run_training(config, directory, cache=Cache(), progress=progress)
        summary = summarise(result)
        minutes = (time.process_time() - began) / 60
    ceiling = None if options.recompute_ceiling else find(options.ceilings, records, weights)
    if ceiling is None:
        ceiling = compute(
            options.data,
            records,
            weights,
            options.ceilings,
            records=options.ceiling_records,
            seed=config.seed,
            progress=progress,
        )
    report = _report(options, result, summary, ceiling)
    return report | {"minutes": round(minutes, 2), "resumed": resumed}


def configuration(options: argparse.Namespace) -> RunConfig:
    """The run's settings: the recipe, the data set, and what the command line changes.

    Raises:
        ConfigError: a setting is not acceptable.
    """
    settings = overlay(
        Recipe.of(options.data, options.epsilon).settings(),
        {
            "seed": options.seed,
            "data": data_settings(options.data, options.data_folder),
            "privacy": {"epsilon": options.epsilon},
            "evaluation": {"records": options.evaluation_records},
        },
    )
    return build(RunConfig, changed_by(settings, options.set))


def gap_closed(
    base: Losses, proxied: Losses, tuned: Losses, seed: int, resamples: int = RESAMPLES
) -> tuple[float, list[float]]:
    """The fraction of the gap and its 95 % interval, by resampling records; all three arms on the same ones.

    Args:
        base, proxied, tuned: `[records]`, sums of negative log-likelihoods over the same tokens.
        seed: of the resampling.

    Raises:
        DataError: the directly tuned model is not better than the base, so that there is no gap.
    """
    gap, gain = base - tuned, base - proxied
    if not gap.sum() > 0:
        raise DataError("the directly tuned model is no better than the large base on these records: there is no gap")
    drawn = bootstrap_rng(seed).integers(len(gap), size=(resamples, len(gap)))
    gaps, gains = gap[drawn].sum(1), gain[drawn].sum(1)
    if not (gaps > 0).all():
        raise DataError("the gap is not above 0 in every resample: too few records to state a fraction of it")
    low, high = np.quantile(gains / gaps, (0.025, 0.975))
    return float(gain.sum() / gap.sum()), [float(low), float(high)]


def _report(
    options: argparse.Namespace, result: RunResult, summary: Mapping[str, Any], ceiling: Mapping[str, Any]
) -> dict[str, Any]:
    evaluation = result.evaluation
    if ceiling["tokens"] != evaluation.tokens.tolist():
        raise DataError("the run judged other records than the ceiling", hint="--recompute-ceiling")
    (proxied,) = evaluation.proxy_tuned.values()
    tuned = np.asarray(ceiling["losses"])
    fraction, interval = gap_closed(evaluation.large_base, proxied, tuned, options.seed)
    arms = {name: round(arm["loss"], 4) for name, arm in summary["arms"].items()}
    return {
        "data": options.data,
        "epsilon": "inf" if math.isinf(options.epsilon) else options.epsilon,
        "seed": options.seed,
        "gap_closed": round(fraction, 4),
        "ci": [round(bound, 4) for bound in interval],
        "arms": arms | {"large_tuned_directly": round(evaluation.loss(tuned), 4)},
        "ceiling": {key: ceiling[key] for key in ("trained_records", "train_records")},
        "records": len(evaluation.tokens),
        "tokens": int(evaluation.tokens.sum()),
        "alpha": summary["alpha"],
        "shares": summary["shares"],
        "rounds": summary["training"]["rounds"],
        "cohort": summary["training"]["cohort"],
        "sampling_rate": result.config.privacy.sampling_rate,
        "trained_parameters": result.dimension,
        "settings": {
            group: getattr(result.config, group).model_dump(mode="json", exclude_none=True)
            for group in ("lora", "training")
        },
        "seconds": summary["seconds"],
        "bytes": summary["bytes"],
        "private": result.statement.private,
        "privacy": result.statement.claim(),
    }


def _table(result: Mapping[str, Any]) -> Table:
    low, high = result["ci"]
    table = Table(title=f"{result['data']}, epsilon {result['epsilon']}, {result['minutes']} CPU minutes")
    table.add_column("model")
    table.add_column("loss, nats/token", justify="right")
    for name, loss in result["arms"].items():
        table.add_row(name.replace("_", " "), f"{loss:.4f}")
    table.caption = f"gap closed: {result['gap_closed']:.3f} [{low:.3f}, {high:.3f}]; {result['privacy']}"
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=NAMES, required=True)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="M / 30 of the recipe's rounds")
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--run", type=Path, help="keep the run here; one that is there is gone on with")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting, in TOML")
    parser.add_argument("--evaluation-records", type=int, default=EVALUATION_RECORDS)
    parser.add_argument("--ceilings", type=Path, default=CEILINGS)
    parser.add_argument("--recompute-ceiling", action="store_true")
    parser.add_argument("--ceiling-records", type=int, help="train the ceiling on a sample of so many; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
