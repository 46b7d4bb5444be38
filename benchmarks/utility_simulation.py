"""One training run of `utility.py`'s recipe, or of a variant of it, in simulation.

A secure sum of noise shares is, in distribution, the noised sum of DP-SGD on the union of the cohort's records, so that
is what runs here, with the product's own schedule, accountant, server optimizer, adaptive clipping and steering rule;
no keys, no masks, no ring (`utility.py` has them), and records share passes (`utility_gradients.py`). The noise is
drawn from a seeded generator: nothing is released.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from utility_ceiling import EVALUATION_RECORDS
from utility_gradients import RecordSums
from utility_recipe import Recipe, Scale

from fedpt_secure.config import ClassesBy, RunConfig, build, overlay
from fedpt_secure.data import Cache, FederatedText, load_federated_text
from fedpt_secure.data.examples import Example
from fedpt_secure.errors import DataError
from fedpt_secure.federation.iterate_average import IterateAverage
from fedpt_secure.federation.mechanisms import CLIP_RANGE, INDICATOR_WEIGHT
from fedpt_secure.federation.prepared_text import client_examples, large_examples, seeded_sample
from fedpt_secure.federation.schedule import cohort_schedule, participations
from fedpt_secure.federation.server_optimizer import ServerOptimizer, pace_of
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import QuantileClipping, SmallExample
from fedpt_secure.privacy.accounting import calibrate_noise
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy import SteeringRule
from fedpt_secure.proxy.arithmetic import spread_token_logprobs
from fedpt_secure.proxy.steering import steered_token_logprobs

CHOICE_RECORDS = 100
HONEST = 0.8
"""Of the noise shares, those counted on: 0.9 survive, 0.1 may collude."""
DELTA = 1e-5
Which = Literal["choice", "judged"]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One setting; the defaults are the recipe.

    Attributes:
        lora: what of the run's `[lora]` differs.
        classes: of a sampled softmax; None for the whole head.
        classes_by: what chooses them.
        mode: whose noise there is, and what is protected.
        scale: rounds, clients and records of a round; None for those that the noise gives.
        rounds, records: how many times the scale's; records are those of a round.
        noise_aware: the server shrinks a mean update by signal / (signal + noise), both as squared norms.
        warm_up: rounds over which the rate rises.
        cool_down: share of the rounds, at the end, over which the rate falls to 0.
        decay: of an average of iterates; 0 is the last iterate.
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
    classes: int | None = None
    classes_by: ClassesBy = "frequency"
    scale: Scale | None = None
    rounds: float = 1.0
    records: float = 1.0
    decay: float = 0.0
    warm_up: int = 0
    cool_down: float = 0.0
    noise_aware: bool = False
    alpha: float | None = None
    shares: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Case:
        """A recipe of `utility.py` as a case."""
        training = recipe.settings()["training"]
        return cls(
            recipe.departures.get("lora", {}),
            learning_rate=training["server_learning_rate"],
            positions=training["sampled_positions"],
            classes=training.get("output_classes"),
            classes_by=training.get("output_classes_by", "frequency"),
            optimizer=training.get("server_optimizer", "adam"),
            decay=training.get("average_decay", 0.0),
            scale=recipe.scale,
            warm_up=training.get("server_warm_up", 0),
            cool_down=training.get("server_cool_down", 0.0),
        )

    def rule(self, config: RunConfig) -> SteeringRule:
        """What the case is judged by."""
        rule = SteeringRule.of(config.proxy, responses=config.data.has_prompts)
        alpha = rule.alpha if self.alpha is None else self.alpha
        return SteeringRule(alpha, rule.shares if self.shares else ())


@dataclass(frozen=True)
class Trained:
    """An adapter, and how it was made."""

    vector: npt.NDArray[np.float32]
    rounds: int
    noise_multiplier: float


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood of held-out records, in nats: `[records]` each.

    Attributes:
        tokens: how many tokens of each record are judged.
    """

    tokens: npt.NDArray[np.int64]
    large: Vector
    small_tuned: Vector
    proxied: Mapping[SteeringRule, Vector]

    def per_token(self, losses: Vector) -> float:
        """Nats per token."""
        return float(losses.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Loaded:
    """The small LM under one kind of adapter, and the records as it reads them."""

    config: RunConfig
    models: RunModels
    clients: list[npt.NDArray[np.int64]]
    train: RecordSums
    held_out: dict[Which, RecordSums]


class HeldOut:
    """Held-out records, and what training does not change about them."""

    def __init__(self, examples: Sequence[Example], loaded: RunModels, progress: Progress) -> None:
        token_map = loaded.small.token_map
        self.small = [SmallExample(tuple(token_map.to_small(example.ids)), example.loss_from) for example in examples]
        self.tokens = np.array([len(example.ids) - example.loss_from for example in examples])
        self._token_map = token_map
        answers = loaded.black_box(progress).score([example.ids[:-1] for example in examples])
        rows = [answer[example.loss_from - 1 :] for example, answer in zip(examples, answers, strict=True)]
        self._large = torch.cat(rows)
        device = self._large.device
        self._targets = torch.cat([torch.tensor(e.ids[e.loss_from :], device=device) for e in examples])
        self._places = torch.cat([torch.arange(count, device=device) for count in self.tokens.tolist()])
        self._base: torch.Tensor | None = None

    def losses(self, records: RecordSums, small: SmallLM, rules: Sequence[SteeringRule]) -> Losses:
        """Judge the adapter that `small` has loaded; it may have none loaded afterwards."""
        tuned = records.logits(range(len(self.tokens)))
        if self._base is None:
            small.load_adapter_vector(np.zeros(small.dimension, dtype=np.float32))
            self._base = records.logits(range(len(self.tokens)))
        return self.judge(tuned, rules)

    def judge(self, tuned: torch.Tensor, rules: Sequence[SteeringRule]) -> Losses:
        """Judge a small LM by its logits at every judged token, `[tokens, v]`."""
        if self._base is None:
            raise DataError("the base's predictions are not known yet")
        parts = []
        at_once = 64 if tuned.device.type == "cpu" else 1024
        for start in range(0, len(tuned), at_once):
            part = slice(start, start + at_once)
            target = self._targets[part]
            own = self._large[part].gather(-1, target[:, None]).T
            alone = spread_token_logprobs(tuned[part], target, self._token_map)[None]
            asked = self._large[part], self._base[part], tuned[part], target
            steered = steered_token_logprobs(*asked, self._token_map, list(rules), self._places[part])
            parts.append(torch.cat([own, alone, steered]).double().cpu())
        per_token = torch.cat(parts, dim=1).numpy()
        ends = np.cumsum(self.tokens)[:-1]
        large, alone, *steered = -np.stack([part.sum(1) for part in np.split(per_token, ends, axis=1)], axis=1)
        return Losses(self.tokens, large, alone, dict(zip(rules, steered, strict=True)))


class Simulation:
    """One data set under one split: models, records, and the large model's answers, which no setting changes."""

    def __init__(self, settings: Mapping[str, Any], split_seed: int, progress: Progress) -> None:
        """Load them."""
        # So that the head's classes are ranked; how many a step takes is the case's.
        self._settings = overlay(settings, {"seed": split_seed, "training": {"output_classes": 3}})
        self.config = build(RunConfig, self._settings)
        self._text = load_federated_text(self.config.data, seed=split_seed, cache=Cache(), progress=progress)
        self._records = held_out_records(self._text, split_seed)
        self._held_out: dict[Which, HeldOut] = {}
        self._loaded: dict[str, Loaded] = {}
        self._clients: list[list[SmallExample]] = []
        self._progress = progress
        self.weights = self.loaded({}).models.weights

    def held_out(self, which: Which) -> HeldOut:
        """Held-out records and the large model's answers, which are asked for once."""
        if which not in self._held_out:
            models = self.loaded({}).models
            examples = large_examples(self._records[which], models, self.config)
            self._held_out[which] = HeldOut(examples, models, self._progress)
        return self._held_out[which]

    def loaded(self, lora: Mapping[str, Any], classes_by: ClassesBy = "frequency") -> Loaded:
        """The small LM under an adapter; kept over cases of the same one."""
        key = json.dumps([lora, classes_by])
        if key not in self._loaded:
            # One at a time beside the first: kept activations are gigabytes.
            for other in list(self._loaded)[1:]:
                del self._loaded[other]
            changed = {"lora": lora, "training": {"output_classes_by": classes_by}}
            config = build(RunConfig, overlay(self._settings, changed))
            models = load_models(config, cache=Cache(), progress=SILENT)
            if not self._clients:
                self._clients = [client_examples(client, models, config) for client in self._text.clients]
            clients = self._clients
            ends = np.cumsum([0, *map(len, clients)])
            indices = [np.arange(start, end) for start, end in pairwise(ends)]
            compute = {"dtype": models.small.compute.dtype, "at_once": 256 if models.device.type == "cuda" else 64}
            train = RecordSums(models.small, [example for client in clients for example in client], **compute)
            self._loaded[key] = Loaded(config, models, indices, train, {})
        return self._loaded[key]

    def judge(self, case: Case, trained: Trained, which: Which, rules: Sequence[SteeringRule]) -> Losses:
        """Losses over held-out records, steered by each rule."""
        held_out, loaded = self.held_out(which), self.loaded(case.lora, case.classes_by)
        small = loaded.models.small
        if which not in loaded.held_out:
            loaded.held_out[which] = RecordSums(small, held_out.small, dtype=torch.float32, at_once=64)
        small.load_adapter_vector(trained.vector)
        return held_out.losses(loaded.held_out[which], small, rules)

    def train(self, case: Case, epsilon: float, seed: int, progress: Progress = SILENT) -> Trained:
        """Train an adapter.

        Args:
            seed: of the sample, the positions and the noise.
        """
        loaded = self.loaded(case.lora, case.classes_by)
        small, clients = loaded.models.small, loaded.clients
        rng = np.random.default_rng([seed, 11])
        generator = torch.Generator(small.device).manual_seed(seed)
        run = plan(case, epsilon, [len(client) for client in clients], seed)
        clip_norm, clipping = case.clip_norm, _clipping(case)
        weights = np.zeros(small.dimension, dtype=np.float32)
        optimizer = ServerOptimizer.fresh(
            case.optimizer, learning_rate=case.learning_rate, momentum=0.9, dimension=small.dimension
        )
        average = IterateAverage.fresh(case.decay, dimension=small.dimension)
        asked: dict[str, Any] = {"positions": case.positions, "classes": case.classes, "generator": generator}
        with progress.task("rounds", len(run.schedule)) as task:
            for index, cohort in enumerate(run.schedule):
                small.load_adapter_vector(weights)
                if case.mode == "client":
                    total, norms = _clients_sum(loaded.train, [clients[int(name)] for name in cohort], case, asked)
                else:
                    present = np.concatenate([clients[int(name)] for name in cohort])
                    chosen = present[rng.random(len(present)) < run.sampling_rate]
                    total, norms = loaded.train.sum(chosen, clip_norm=clip_norm, **asked)
                unit = 1.0 if clipping is None else clipping.unit_norm
                deviation = run.noise_multiplier * clip_norm * unit * math.sqrt(run.noise_shares) / run.units
                update = -(total / run.units + deviation * rng.standard_normal(small.dimension))
                if case.noise_aware and deviation:
                    noise = small.dimension * deviation**2
                    update *= max(0.0, 1 - noise / float(update @ update))
                paced = {"warm_up": case.warm_up, "cool_down": case.cool_down}
                pace = pace_of(index, rounds=len(run.schedule), **paced)
                weights, optimizer = optimizer.apply(weights, update, pace=pace)
                average = average.with_iterate(weights)
                if clipping is not None:
                    counted = clipping.coordinate(norms, clip_norm)
                    counted += run.noise_multiplier * unit * math.sqrt(run.noise_shares) * rng.standard_normal()
                    clip_norm = clipping.next_clip_norm(clip_norm, counted, expected_units=run.units)
                task.advance()
        final = average.value(weights) if case.decay else weights
        return Trained(final, len(run.schedule), run.noise_multiplier)


@dataclass(frozen=True)
class Plan:
    """A run's public numbers.

    Attributes:
        schedule: names of the clients (their indices) of each round.
        sampling_rate: of records; of clients, 1.
        units: expected number of records (or clients) in a round's sum.
        noise_multiplier: against the strongest adversary that the promise names.
        noise_shares: how many times that variance the sum has, because not all noise is counted on.
    """

    schedule: Sequence[Sequence[str]]
    sampling_rate: float
    units: float
    noise_multiplier: float
    noise_shares: float


def plan(case: Case, epsilon: float, sizes: Sequence[int], seed: int) -> Plan:
    """Cohorts, rate and noise as `utility.py` has them.

    Args:
        sizes: training records of each client.
    """
    total, clients = sum(sizes), len(sizes)
    scale = case.scale or Scale.of(epsilon, total)
    scale, by_client = replace(scale, records=scale.records * case.records), case.mode == "client"
    cohort = min(clients, max(1, round(scale.records * clients / total)) if by_client else scale.clients)
    rounds = max(1, round(scale.rounds * case.rounds))
    schedule = cohort_schedule([f"{index:05}" for index in range(clients)], rounds=rounds, cohort=cohort, seed=seed)
    rate = 1.0 if by_client else scale.sampling_rate(clients=clients, cohort=cohort, records=total)
    multiplier = calibrate_noise(
        epsilon=epsilon, delta=DELTA, sampling_rate=rate, steps=max(participations(schedule).values())
    )
    units = cohort if by_client else rate * total * cohort / clients
    return Plan(schedule, rate, units, multiplier, cohort if case.mode == "local" else 1 / HONEST)


def held_out_records(text: FederatedText, seed: int) -> dict[Which, list[Any]]:
    """Held-out records: those that `utility.py` judges, and others, to choose by.

    Raises:
        DataError: there are too few.
    """
    held_out = [record for client in text.clients for record in client.held_out]
    counts = EVALUATION_RECORDS, EVALUATION_RECORDS + CHOICE_RECORDS
    judged, more = (
        seeded_sample(range(len(held_out)), count, purpose="evaluation sample", seed=seed) for count in counts
    )
    choice = sorted(set(more) - set(judged))
    if len(choice) < CHOICE_RECORDS:
        raise DataError(f"{len(held_out)} held-out records leave {len(choice)} beside those that utility.py judges")
    return {"choice": [held_out[i] for i in choice], "judged": [held_out[i] for i in judged]}


def _clients_sum(
    train: RecordSums, cohort: Sequence[npt.NDArray[np.int64]], case: Case, asked: Mapping[str, Any]
) -> tuple[Vector, Vector]:
    """Mode `client`: the sum of clipped client updates."""
    total, norms = None, []
    for client in cohort:
        vector = train.sum(client, clip_norm=math.inf, **asked)[0] / len(client)
        norms.append(float(np.linalg.norm(vector)))
        vector *= min(1.0, case.clip_norm / norms[-1])
        total = vector if total is None else total + vector
    return np.asarray(total), np.asarray(norms)


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
