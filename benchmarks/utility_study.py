"""What each setting is worth by itself, and what the recipe reaches by epsilon: many simulated runs side by side.

    python benchmarks/utility_study.py run --results study.jsonl --data chat --seeds 0,1,2 --epsilons 4,inf
    python benchmarks/utility_study.py run --results study.jsonl --seeds 0 --cases "rank 32,rank 128"
    python benchmarks/utility_study.py table --results study.jsonl
    python benchmarks/utility_study.py curve --results curve.jsonl --data chat --epsilons 0.5,1,2,4,8,inf
    python benchmarks/utility_study.py curve --results curve.jsonl --data chat --epsilons 8 --departures

**Simulated** (`utility_simulation.py`): what the recipe's runs are in distribution, without keys, masks and ring.

`run`: every case makes the recipe's rounds of the recipe's records unless its name says otherwise, and no
more records in all. Judged on held-out records that `utility.py` does not judge, so that choosing by the
table is not choosing on reported figures. Gains are in nats per token over the large LM alone; the difference is to the
reference, over seeds, whose split, sample and noise are their own.

`curve`: the common recipe, or with `--departures` what `utility.py` trains with, on the records that `utility.py`
judges and against its ceilings. The split is seed 0's, the sample, the positions and the noise are each seed's own.

`--device cuda` wants a GPU: a case takes seconds there, and minutes on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from utility import gap_closed
from utility_ceiling import CEILINGS, EVALUATION_RECORDS, find, tokenizer_of
from utility_command import finished, floats
from utility_data import NAMES, changed_by, data_settings, load_records
from utility_recipe import ALL_MATRICES, DEPARTURES, Recipe
from utility_results import append_line, epsilon_in_json, read_lines
from utility_simulation import Case, Simulation

from fedpt_secure.errors import DataError
from fedpt_secure.progress import Progress

SPLIT = 0
"""The split of `curve`: that of the ceilings."""
CASES: Mapping[str, Case] = {
    "reference: last `down_proj`, rank 256, Adam .02": Case(),
    "rank 32, rate .05": Case({"rank": 32}, learning_rate=0.05),
    "rank 128": Case({"rank": 128}),
    "rank 512": Case({"rank": 512}),
    "rank 32, random directions, rate .05": Case({"rank": 32, "directions": "random"}, learning_rate=0.05),
    "all matrices of the last layer, rank 32": Case({"rank": 32, "modules": ALL_MATRICES}),
    "all matrices of the last layer, rank 32, rate .01": Case(
        {"rank": 32, "modules": ALL_MATRICES}, learning_rate=0.01
    ),
    "`down_proj` of the last two layers, rank 32": Case({"rank": 32, "layers": 2}),
    "`down_proj` of the last two layers, rank 32, rate .01": Case({"rank": 32, "layers": 2}, learning_rate=0.01),
    "`down_proj` of all layers, rank 32, rate .002": Case({"rank": 32, "layers": 0}, learning_rate=0.002),
    "all matrices of all layers, rank 32, rate .001": Case(
        {"rank": 32, "layers": 0, "modules": ALL_MATRICES}, learning_rate=0.001
    ),
    "clip norm .03": Case(clip_norm=0.03),
    "clip norm .3": Case(clip_norm=0.3),
    "clip norm by a private quantile": Case(clip_norm=0.5, quantile=0.5),
    "rate .01": Case(learning_rate=0.01),
    "rate .04": Case(learning_rate=0.04),
    "rate rising over 3 rounds": Case(warm_up=3),
    "rate falling over the last half": Case(cool_down=0.5),
    "momentum, rate 6": Case(optimizer="momentum", learning_rate=6.0),
    "momentum, rate 25": Case(optimizer="momentum", learning_rate=25.0),
    "momentum, rate 100": Case(optimizer="momentum", learning_rate=100.0),
    "plain average, rate 60": Case(optimizer="average", learning_rate=60.0),
    "plain average, rate 250": Case(optimizer="average", learning_rate=250.0),
    "plain average, rate 1000": Case(optimizer="average", learning_rate=1000.0),
    "average of iterates, decay .9": Case(decay=0.9),
    "noise-aware steps": Case(noise_aware=True),
    "all positions": Case(positions=None),
    "8 positions": Case(positions=8),
    "sampled softmax, 2,048 classes": Case(classes=2048),
    "sampled softmax, 4,096 classes": Case(classes=4096),
    "sampled softmax, 768 classes by the record": Case(classes=768, classes_by="record"),
    "a bias of the head's classes": Case({"output_bias": 0.03}),
    "half the rounds, twice the records": Case(rounds=0.5, records=2.0),
    "twice the rounds, half the records": Case(rounds=2.0, records=0.5),
    "mode `local`": Case(mode="local"),
    "mode `client`": Case(mode="client"),
    **{
        f"what `{data}` departs to from epsilon {least:g} on": Case.of(recipe)
        for (data, least), recipe in DEPARTURES.items()
    },
}
RULES: Mapping[str, Case] = {
    "the rule: alpha .75": Case(alpha=0.75),
    "the rule: alpha .25": Case(alpha=0.25),
    "the rule: alpha .5, no shares (plain proxy tuning)": Case(alpha=0.5, shares=False),
    "the rule: alpha 1, no shares (the paper's)": Case(alpha=1.0, shares=False),
}
"""Judged with the reference's own adapter."""
REFERENCE = next(iter(CASES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, or print the table; the exit code."""
    options = parse(arguments)
    work = {"run": study, "curve": curve, "table": lambda options, _: print(table(read_lines(options.results)))}
    return finished(lambda progress: work[options.what](options, progress))


def study(options: argparse.Namespace, progress: Progress) -> None:
    """Run what is not in the results yet, and append each case as it is done.

    Raises:
        FedptError: a case cannot be run.
    """
    for seed in options.seeds:
        simulation: Simulation | None = None
        # Case by case, so that an adapter's activations are computed once for all epsilons.
        for name in options.cases:
            for epsilon in options.epsilons:
                key = {"data": options.data, "seed": seed, "epsilon": epsilon_in_json(epsilon)}
                if _there(options.results, {**key, "case": name}):
                    continue
                simulation = simulation or Simulation(configured(options), seed, progress)
                for line in _measured(simulation, name, epsilon, seed, progress):
                    append_line(options.results, {**key, **line})


def _measured(simulation: Simulation, name: str, epsilon: float, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Train and judge one case; the reference's adapter is judged under `RULES` too."""
    case = CASES[name]
    began = time.perf_counter()
    trained = simulation.train(case, epsilon, seed, progress)
    config = simulation.loaded(case.lora, case.classes_by).config
    cases = {name: case, **(RULES if name == REFERENCE else {})}
    rules = {label: case.rule(config) for label, case in cases.items()}
    losses = simulation.judge(case, trained, "choice", list(rules.values()))
    seconds = round(time.perf_counter() - began, 1)
    return [
        {
            "case": label,
            "trained_parameters": len(trained.vector),
            "rounds": trained.rounds,
            "noise_multiplier": round(trained.noise_multiplier, 4),
            "seconds": seconds,
            "small_tuned": round(losses.per_token(losses.small_tuned), 4),
            "gain": round(losses.per_token(losses.large - losses.proxied[rule]), 4),
        }
        for label, rule in rules.items()
    ]


def curve(options: argparse.Namespace, progress: Progress) -> None:
    """The fraction of the gap that the common recipe closes, or what the data depart to; appended line by line.

    Raises:
        FedptError: a run cannot be made, or there is no ceiling for the records.
    """
    simulation: Simulation | None = None
    for seed in options.seeds:
        for epsilon in options.epsilons:
            case = replace(CASES[REFERENCE], lora={})
            key = {"data": options.data, "seed": seed, "epsilon": epsilon_in_json(epsilon)}
            if options.departures:
                case = Case.of(Recipe.of(options.data, epsilon))
                key["recipe"] = "departure"
            if _there(options.results, key):
                continue
            if simulation is None:
                simulation = Simulation(configured(options), SPLIT, progress)
                tuned = ceiling_losses(simulation)
            began = time.perf_counter()
            trained = simulation.train(case, epsilon, seed, progress)
            rule = case.rule(simulation.config)
            losses = simulation.judge(case, trained, "judged", [rule])
            proxied = losses.proxied[rule]
            fraction, interval = gap_closed(losses.large, proxied, tuned, seed)
            line = {
                "gap_closed": round(fraction, 4),
                "ci": [round(bound, 4) for bound in interval],
                "large": round(losses.per_token(losses.large), 4),
                "small_tuned": round(losses.per_token(losses.small_tuned), 4),
                "proxied": round(losses.per_token(proxied), 4),
                "large_tuned_directly": round(losses.per_token(tuned), 4),
                "rounds": trained.rounds,
                "noise_multiplier": round(trained.noise_multiplier, 4),
                "seconds": round(time.perf_counter() - began, 1),
            }
            append_line(options.results, {**key, **line})


def ceiling_losses(simulation: Simulation) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses of the directly tuned model on the judged records.

    Raises:
        DataError: nobody has computed them.
    """
    config = simulation.config
    records = load_records(
        config.data.model_dump(exclude_none=True),
        tokenizer_of(simulation.weights),
        seed=config.seed,
        evaluation_records=EVALUATION_RECORDS,
        context_length=config.models.context_length,
    )
    entry = find(CEILINGS, records, simulation.weights)
    if entry is None or entry["tokens"] != simulation.held_out("judged").tokens.tolist():
        raise DataError("there is no ceiling for these records", hint="benchmarks/utility_ceiling.py")
    return np.asarray(entry["losses"])


def _there(results: Path, key: Mapping[str, Any]) -> bool:
    told = (line for line in read_lines(results) if line.get("recipe") == key.get("recipe"))
    return any(all(line[name] == value for name, value in key.items()) for line in told)


def configured(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of all cases: the data, and what the command line changes.

    Raises:
        ConfigError: a setting is not TOML.
    """
    settings: dict[str, Any] = {
        "data": data_settings(options.data, options.data_folder),
        "models": {"device": options.device},
        "lora": {"rank": 256},
    }
    return changed_by(settings, options.set)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each case's gain by epsilon, mean over seeds, and its difference from the reference.

    Raises:
        DataError: no lines.
    """
    if not lines:
        raise DataError("there are no results yet", hint="utility_study.py run --results FILE ...")
    columns = sorted({(line["data"], str(line["epsilon"])) for line in lines})
    gains: dict[tuple[str, str, str], dict[int, float]] = {}
    for line in lines:
        gains.setdefault((line["case"], line["data"], str(line["epsilon"])), {})[line["seed"]] = line["gain"]
    facts = {line["case"]: line for line in lines}
    rows = [
        "| case | d | s | " + " | ".join(f"{data}, epsilon {epsilon}" for data, epsilon in columns) + " |",
        "| --- | --- | --- |" + " --- |" * len(columns),
    ]
    for name in [*CASES, *RULES]:
        if name not in facts:
            continue
        cells = [_cell(gains.get((name, *column), {}), gains.get((REFERENCE, *column), {})) for column in columns]
        seconds = mean(line["seconds"] for line in lines if line["case"] == name)
        rows.append(f"| {name} | {facts[name]['trained_parameters']:,} | {seconds:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(gains: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """Mean gain, then mean and standard deviation over seeds of the difference, and how many seeds."""
    if not gains:
        return ""
    differences = [gains[seed] - reference[seed] for seed in gains if seed in reference]
    cell = f"{mean(gains.values()):.4f}"
    if not any(differences):
        return f"{cell} (n {len(gains)})"
    spread = f" ± {stdev(differences):.4f}" if len(differences) > 1 else ""
    return f"{cell}: {mean(differences):+.4f}{spread} (n {len(differences)})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "curve"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default="chat")
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting, in TOML")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--epsilons", type=floats, default=[4.0, math.inf])
    parser.add_argument(
        "--departures", action="store_true", help="curve: what the data depart to from the common recipe"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", default="", help="their names, or beginnings of them, comma-separated; default: all")
    options = parser.parse_args(arguments)
    wanted = [part.strip() for part in options.cases.split(",") if part.strip()]
    if unknown := [part for part in wanted if not any(name.startswith(part) for name in CASES)]:
        parser.error(f"no case begins with {unknown[0]!r}; there are: {'; '.join(CASES)}")
    options.cases = [name for name in CASES if not wanted or any(name.startswith(part) for part in wanted)]
    return options


if __name__ == "__main__":
    sys.exit(main())
