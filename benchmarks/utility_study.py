"""What each setting is worth by itself: many settings side by side, on the same records and the same budget.

    python benchmarks/utility_study.py run --results study.jsonl --data chat --seeds 0,1,2 --epsilons 4,inf
    python benchmarks/utility_study.py run --results study.jsonl --data chat --seeds 0 --cases "rank 32,rank 128"
    python benchmarks/utility_study.py table --results study.jsonl

**Simulated**: a secure sum of noise shares is, in distribution, the noised sum of central DP-SGD on the union of the
clients' records, so that is what runs here, by the product's own clipped sums, accountant, server optimizer and
steering rule; no keys, no masks, no ring (`utility.py` has them). To be cheap, of a round's sample only `RECORDS` are
computed, at the noise that the whole sample of `SAMPLED` would have: the noise's share is right, and the gradient
noisier than a run's. So the figures order settings; they are no run's results.

Every case makes `ROUNDS` rounds of `RECORDS` records unless its name says otherwise, and no more records in all.
Judged on held-out records that `utility.py` does not judge; no reported figure is of them. Gains are in nats per token
over the large LM alone; the difference is to the reference, over seeds, whose split, sample and noise are their own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor
from utility_ceiling import EVALUATION_RECORDS
from utility_data import NAMES, changed_by, data_settings
from utility_results import append_line, epsilon_in_json, read_lines

from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.data import Cache, FederatedText, load_federated_text
from fedpt_secure.data.examples import Example
from fedpt_secure.errors import DataError, FedptError
from fedpt_secure.evaluation import evaluate_arms
from fedpt_secure.federation.iterate_average import IterateAverage
from fedpt_secure.federation.mechanisms import CLIP_RANGE, INDICATOR_WEIGHT
from fedpt_secure.federation.prepared_text import client_examples, large_examples, seeded_sample
from fedpt_secure.federation.server_optimizer import ServerOptimizer
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.privacy import QuantileClipping, SmallExample
from fedpt_secure.privacy.accounting import calibrate_noise
from fedpt_secure.privacy.clipped_sum import clipped_sum
from fedpt_secure.privacy.examples import SampledPositions
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy import AdapterPair, SteeringRule
from fedpt_secure.proxy.black_box import BlackBoxLM, Capabilities, Session

ROUNDS, RECORDS = 10, 250
SAMPLED, SAMPLED_ROUNDS = 0.3, 30
"""The run whose noise is simulated: rate and rounds, all clients in every round."""
HONEST = 0.8
"""Of the noise shares, those counted on: 0.9 survive, 0.1 may collude."""
CHOICE_RECORDS = 60
DELTA = 1e-5
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One setting; the defaults are the reference.

    Attributes:
        lora: what of the run's `[lora]` differs.
        mode: whose noise there is, and what is protected.
        noise_aware: the server shrinks a mean update by signal / (signal + noise), both as squared norms.
        alpha: of the steering rule; None for the default rule.
        shares: whether the rule blends.
    """

    lora: Mapping[str, Any] = field(default_factory=dict)
    mode: Literal["local", "distributed", "client"] = "distributed"
    optimizer: Literal["average", "momentum", "adam"] = "adam"
    learning_rate: float = 0.02
    clip_norm: float = 0.1
    quantile: float | None = None
    positions: int | None = 32
    rounds: int = ROUNDS
    records: int = RECORDS
    decay: float = 0.0
    warm_up: int = 0
    noise_aware: bool = False
    alpha: float | None = None
    shares: bool = True


LAST_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES: Mapping[str, Case] = {
    "reference: last `down_proj`, rank 256, Adam .02": Case(),
    "rank 32, rate .05": Case({"rank": 32}, learning_rate=0.05),
    "rank 128": Case({"rank": 128}),
    "rank 512": Case({"rank": 512}),
    "rank 32, random directions, rate .05": Case({"rank": 32, "directions": "random"}, learning_rate=0.05),
    "all matrices of the last layer, rank 32": Case({"rank": 32, "modules": LAST_LAYER}),
    "`down_proj` of the last two layers, rank 32": Case({"rank": 32, "layers": 2}),
    "all matrices of all layers, rank 32, rate .001": Case(
        {"rank": 32, "layers": 0, "modules": LAST_LAYER}, learning_rate=0.001
    ),
    "clip norm 1": Case(clip_norm=1.0),
    "clip norm by a private quantile": Case(clip_norm=0.5, quantile=0.5),
    "rate .01": Case(learning_rate=0.01),
    "rate .04": Case(learning_rate=0.04),
    "rate rising over 3 rounds": Case(warm_up=3),
    "momentum": Case(optimizer="momentum", learning_rate=25.0),
    "plain average": Case(optimizer="average", learning_rate=250.0),
    "average of iterates, decay .8": Case(decay=0.8),
    "noise-aware steps": Case(noise_aware=True),
    "all positions": Case(positions=None),
    "8 positions": Case(positions=8),
    "half the rounds, twice the records": Case(rounds=ROUNDS // 2, records=2 * RECORDS),
    "twice the rounds, half the records": Case(rounds=2 * ROUNDS, records=RECORDS // 2),
    "mode `local`": Case(mode="local"),
    "mode `client`": Case(mode="client"),
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
    """Run cases or print the table; the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    quiet_libraries()
    console = Console(stderr=True)
    try:
        if options.what == "table":
            print(table(read_lines(options.results)))
            return 0
        with shown_on(console) as progress:
            study(options, progress)
    except FedptError as error:
        console.print(f"error: {error}", markup=False)
        return error.exit_code
    return 0


def study(options: argparse.Namespace, progress: Progress) -> None:
    """Run what is not in the results yet, and append each case as it is done.

    Raises:
        FedptError: a case cannot be run.
    """
    for seed in options.seeds:
        bench: Bench | None = None
        for epsilon in options.epsilons:
            for name in options.cases:
                key = {"data": options.data, "seed": seed, "epsilon": epsilon_in_json(epsilon)}
                if any(
                    all(line[k] == v for k, v in {**key, "case": name}.items()) for line in read_lines(options.results)
                ):
                    continue
                bench = bench or Bench(configured(options), seed, progress)
                for line in bench.measure(name, epsilon, progress):
                    append_line(options.results, {**key, **line})


def configured(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of all cases: the data, and what the command line changes.

    Raises:
        ConfigError: a setting is not TOML.
    """
    settings: dict[str, Any] = {
        "data": data_settings(options.data, options.data_folder),
        "models": {"activation_cache_mb": 3072},
        "lora": {"rank": 256},
    }
    return changed_by(settings, options.set)


class Bench:
    """One data set under one seed: models, records, and the large model's answers, which no setting changes."""

    def __init__(self, settings: Mapping[str, Any], seed: int, progress: Progress) -> None:
        self._settings = overlay(settings, {"seed": seed})
        self._text = load_federated_text(
            build(RunConfig, self._settings).data, seed=seed, cache=Cache(), progress=progress
        )
        self._seed = seed
        self._models: dict[str, tuple[RunConfig, RunModels, list[list[SmallExample]]]] = {}
        config, models, _ = self._loaded({})
        self._judged = large_examples(_choice(self._text, seed), models, config)
        self._large = Remembered(models.black_box(progress), self._judged)

    def measure(self, name: str, epsilon: float, progress: Progress) -> Iterator[dict[str, Any]]:
        """Train and judge one case; the reference's adapter is judged under `RULES` too."""
        case = CASES[name]
        began = time.process_time()
        config, models, clients = self._loaded(case.lora)
        small = models.small
        small.load_adapter_vector(np.zeros(small.dimension, dtype=np.float32))
        small.load_adapter_vector(self._train(case, epsilon, models, clients, progress))
        rules = {name: case, **(RULES if name == REFERENCE else {})}
        steering = [self._rule(config, rule) for rule in rules.values()]
        evaluation = evaluate_arms(self._judged, self._large, AdapterPair(small.model, small.token_map), steering)
        large = evaluation.loss(evaluation.large_base)
        for label, rule in zip(rules, steering, strict=True):
            yield {
                "case": label,
                "trained_parameters": small.dimension,
                "cpu_s": round(time.process_time() - began),
                "small_tuned": round(evaluation.loss(evaluation.small_tuned), 4),
                "gain": round(large - evaluation.loss(evaluation.proxy_tuned[rule]), 4),
            }

    def _train(
        self, case: Case, epsilon: float, models: RunModels, clients: list[list[SmallExample]], progress: Progress
    ) -> npt.NDArray[np.float32]:
        small, rng = models.small, np.random.default_rng([self._seed, 11])
        records = [example for client in clients for example in client]
        by_client = case.mode == "client"
        rounds = round(SAMPLED_ROUNDS * case.rounds / ROUNDS)
        rate = 1.0 if by_client else SAMPLED * case.records / RECORDS
        multiplier = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=rate, steps=rounds)
        shares = len(clients) if case.mode == "local" else 1 / HONEST
        units = rate * len(clients if by_client else records)
        clip_norm, clipping = case.clip_norm, _clipping(case)
        weights = small.adapter_vector()
        optimizer = ServerOptimizer.fresh(
            case.optimizer, learning_rate=case.learning_rate, momentum=0.9, dimension=small.dimension
        )
        average = IterateAverage.fresh(case.decay, dimension=small.dimension)
        with progress.task("rounds", case.rounds) as task:
            for index in range(case.rounds):
                positions = None if case.positions is None else SampledPositions(case.positions, rng.bytes(16))
                if by_client:
                    mean_sum, norms = _clients_sum(small, clients, case, positions, rng)
                else:
                    chosen = np.flatnonzero(rng.random(len(records)) < case.records / len(records))
                    total = clipped_sum(small, [records[i] for i in chosen], clip_norm=clip_norm, positions=positions)
                    mean_sum, norms = total.vector / case.records, total.norms
                unit = 1.0 if clipping is None else clipping.unit_norm
                deviation = multiplier * clip_norm * unit * math.sqrt(shares) / units
                update = -(mean_sum + deviation * rng.standard_normal(small.dimension))
                if case.noise_aware and deviation:
                    noise = small.dimension * deviation**2
                    update *= max(0.0, 1 - noise / float(update @ update))
                warmth = min(1.0, (index + 1) / max(1, case.warm_up))
                optimizer = replace(optimizer, learning_rate=case.learning_rate * warmth)
                weights, optimizer = optimizer.apply(weights, update)
                average = average.with_iterate(weights)
                small.load_adapter_vector(weights)
                if clipping is not None:
                    counted = clipping.coordinate(norms, clip_norm) * units / case.records
                    counted += multiplier * unit * math.sqrt(shares) * rng.standard_normal()
                    clip_norm = clipping.next_clip_norm(clip_norm, counted, expected_units=units)
                task.advance()
        return average.value(weights) if case.decay else weights

    def _loaded(self, lora: Mapping[str, Any]) -> tuple[RunConfig, RunModels, list[list[SmallExample]]]:
        """The small LM under an adapter, with its activations kept over cases of the same cut."""
        key = json.dumps(lora)
        if key not in self._models:
            # One at a time beside the reference's: kept activations are gigabytes.
            for other in list(self._models)[1:]:
                del self._models[other]
            config = build(RunConfig, overlay(self._settings, {"lora": lora}))
            models = load_models(config, cache=Cache(), progress=SILENT)
            self._models[key] = config, models, [client_examples(c, models, config) for c in self._text.clients]
        return self._models[key]

    @staticmethod
    def _rule(config: RunConfig, case: Case) -> SteeringRule:
        rule = SteeringRule.of(config.proxy, responses=config.data.has_prompts)
        if case.alpha is not None:
            rule = SteeringRule(case.alpha, rule.shares)
        return rule if case.shares else SteeringRule(rule.alpha)


class Remembered:
    """A black box that has answered already: the texts it is asked about are always the same."""

    def __init__(self, inner: BlackBoxLM, examples: Sequence[Example]) -> None:
        self._inner = inner
        sequences = sorted((tuple(example.ids[:-1]) for example in examples), key=len)
        answers = inner.score(sequences)
        self._answers = {sequence: answer.clone() for sequence, answer in zip(sequences, answers, strict=True)}

    @property
    def capabilities(self) -> Capabilities:
        """See `BlackBoxLM`."""
        return self._inner.capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """See `BlackBoxLM`."""
        return self._inner.vocabulary

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """See `BlackBoxLM`."""
        return (self._answers[tuple(sequence)] for sequence in sequences)

    def start(self, prompts: Sequence[Sequence[int]]) -> Session:
        """See `BlackBoxLM`."""
        return self._inner.start(prompts)


def _choice(text: FederatedText, seed: int) -> list[Any]:
    """Held-out records beyond those that `utility.py` judges."""
    held_out = [record for client in text.clients for record in client.held_out]
    names = ("evaluation sample", EVALUATION_RECORDS), ("evaluation sample", EVALUATION_RECORDS + CHOICE_RECORDS)
    judged, more = (seeded_sample(range(len(held_out)), count, purpose=name, seed=seed) for name, count in names)
    chosen = sorted(set(more) - set(judged))
    if len(chosen) < CHOICE_RECORDS:
        raise DataError(f"{len(held_out)} held-out records leave {len(chosen)} beside those that utility.py judges")
    return [held_out[index] for index in chosen]


def _clients_sum(
    small: Any,
    clients: Sequence[Sequence[SmallExample]],
    case: Case,
    positions: SampledPositions | None,
    rng: np.random.Generator,
) -> tuple[Vector, Vector]:
    """Mode `client`: the mean of clipped client updates, of so many clients as have a round's records together."""
    mean_records = sum(map(len, clients)) / len(clients)
    count = max(1, round(case.records / mean_records))
    total, norms = np.zeros(small.dimension), []
    for index in rng.choice(len(clients), count, replace=False):
        vector = clipped_sum(small, clients[index], clip_norm=math.inf, positions=positions).vector
        vector /= len(clients[index])
        norms.append(float(np.linalg.norm(vector)))
        total += vector * min(1.0, case.clip_norm / norms[-1])
    return total / count, np.asarray(norms)


def _clipping(case: Case) -> QuantileClipping | None:
    if case.quantile is None:
        return None
    return QuantileClipping(
        quantile=case.quantile,
        learning_rate=0.2,
        weight=INDICATOR_WEIGHT,
        smallest=case.clip_norm / CLIP_RANGE,
        largest=case.clip_norm * CLIP_RANGE,
    )


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
        "| case | d | CPU s | " + " | ".join(f"{data}, epsilon {epsilon}" for data, epsilon in columns) + " |",
        "| --- | --- | --- |" + " --- |" * len(columns),
    ]
    for name in [*CASES, *RULES]:
        if name not in facts:
            continue
        cells = [_cell(gains.get((name, *column), {}), gains.get((REFERENCE, *column), {})) for column in columns]
        seconds = mean(line["cpu_s"] for line in lines if line["case"] == name)
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


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default="chat")
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting, in TOML")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--epsilons", type=_floats, default=[4.0, math.inf])
    parser.add_argument("--cases", default="", help="their names, or beginnings of them, comma-separated; default: all")
    options = parser.parse_args(arguments)
    wanted = [part.strip() for part in options.cases.split(",") if part.strip()]
    if unknown := [part for part in wanted if not any(name.startswith(part) for name in CASES)]:
        parser.error(f"no case begins with {unknown[0]!r}; there are: {'; '.join(CASES)}")
    options.cases = [name for name in CASES if not wanted or any(name.startswith(part) for part in wanted)]
    return options


if __name__ == "__main__":
    sys.exit(main())
