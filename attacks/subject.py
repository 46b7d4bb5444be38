"""A finished run as an audit finds it: its data, its models, its promise. Views for attacks are made from it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedpt_secure.attacks.scores import RecordSignals
from fedpt_secure.attacks.views import FORMS, Answer, Candidate, moments, restrict
from fedpt_secure.config import RunConfig
from fedpt_secure.data import Cache, FederatedText, Record, encode, load_federated_text
from fedpt_secure.data.planting import Planted, plant
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation import RunDirectory, load_planted
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.privacy import SmallExample
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import AdapterPair, SteeringRule, steered_logprobs


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited.

    Attributes:
        statement: content of `privacy.json`.
        text: the clients' own records, without planted ones.
        planted: what the auditor planted, with its coins.
        schedule: cohorts by round.
        survivors: by round, whose update is in the sum.
        adapter: the released one, loaded in `models.small`.
    """

    directory: RunDirectory
    config: RunConfig
    statement: dict[str, Any]
    text: FederatedText
    planted: Planted
    models: RunModels
    schedule: tuple[tuple[str, ...], ...]
    survivors: tuple[tuple[str, ...], ...]
    adapter: npt.NDArray[np.float32]
    run_id: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of what the audit is of: the run, its adapter and its promise."""
        content = hashlib.sha256(self.run_id + self.adapter.astype("<f4").tobytes())
        content.update(repr(sorted(self.statement.items())).encode())
        return content.hexdigest()

    @property
    def black_box_is_elsewhere(self) -> bool:
        """Whether asking the black box sends text to another machine."""
        endpoint = self.config.models.endpoint
        return endpoint is not None and not endpoint.on_this_machine

    def members(self) -> list[Record]:
        """Training records of the clients' own that are in some sum."""
        used = set().union(*self.survivors)
        return [record for client in self.text.clients if client.client_id in used for record in client.train]

    def non_members(self) -> list[Record]:
        """Records of the same clients that were held out, at random and before training."""
        used = set().union(*self.survivors)
        return [record for client in self.text.clients if client.client_id in used for record in client.held_out]

    def candidates(self, records: Sequence[Record]) -> list[Candidate]:
        """Records with their token ids."""
        length = self.config.models.context_length
        return [Candidate(record, encode(record, self.models.tokenizer, context_length=length)) for record in records]

    def small_example(self, record: Record) -> SmallExample:
        """A record as the small LM trains on it."""
        example = encode(record, self.models.tokenizer, context_length=self.config.models.context_length)
        return SmallExample(tuple(self.models.small.token_map.to_small(example.ids)), example.loss_from)

    def adapter_view(self) -> AdapterView:
        """For an attacker who has the adapter."""
        return AdapterView(self.models.pair)

    def endpoint_view(self, progress: Progress) -> ServedView:
        """For an attacker who may ask; computed in process, by the code that serves."""
        return ServedView(
            self.models, SteeringRule.of(self.config.proxy, responses=self.config.data.has_prompts), progress
        )


class AdapterView:
    """`views.ReleasedAdapter` over a run's models."""

    def __init__(self, pair: AdapterPair) -> None:
        self._pair = pair

    def signals(self, candidates: Sequence[Candidate]) -> Iterator[RecordSignals]:
        """See `views.ReleasedAdapter.signals`."""
        to_small = self._pair.token_map.to_small
        sequences = [to_small(item.example.ids) for item in candidates]
        answers = self._pair.score([sequence[:-1] for sequence in sequences])
        for item, sequence, (base, tuned) in zip(candidates, sequences, answers, strict=True):
            start = item.example.loss_from
            targets = torch.tensor(sequence[start:], device=tuned.device)[:, None]
            base, tuned = base[start - 1 :], tuned[start - 1 :]
            mean, deviation = moments(tuned)
            log_p, log_reference = (
                side.gather(-1, targets).squeeze(-1).double().cpu().numpy() for side in (tuned, base)
            )
            yield RecordSignals(log_p, log_reference, item.record.text, mean, deviation)


class ServedView:
    """`views.Endpoint` in process: the steering that serves, and nothing of what lies behind it."""

    def __init__(self, models: RunModels, rule: SteeringRule, progress: Progress) -> None:
        self._models = models
        self._rule = rule
        self._progress = progress

    def answers(self, candidates: Sequence[Candidate]) -> Iterator[tuple[dict[str, Answer], dict[str, Answer]]]:
        """See `views.Endpoint.answers`."""
        pair = self._models.pair
        sequences = [item.example.ids[:-1] for item in candidates]
        large_answers = self._models.black_box(self._progress).score(sequences)
        small_answers = pair.score([pair.token_map.to_small(sequence) for sequence in sequences])
        for item, large, (base, tuned) in zip(candidates, large_answers, small_answers, strict=True):
            start = item.example.loss_from - 1
            large = large[start:]
            base, tuned = (side[start:].to(large.device) for side in (base, tuned))
            places = torch.arange(len(large), device=large.device)
            served = steered_logprobs(large, base, tuned, pair.token_map, self._rule, places)
            yield (
                {form: restrict(served, form) for form in FORMS},
                {form: restrict(large, form) for form in FORMS},
            )


def load_subject(directory: RunDirectory, *, cache: Cache, progress: Progress) -> Subject:
    """Read a finished run and what it was trained on.

    Raises:
        RunDirectoryError: the run is not finished or damaged, or the data is not what it was trained on.
        FedptError: the data or a model cannot be loaded.
    """
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    statement_path = directory.path / "privacy.json"
    if checkpoint is None or checkpoint.rounds_done < config.federation.rounds or not statement_path.exists():
        raise RunDirectoryError(
            f"{directory.path} is not a finished run",
            hint=f"`fedpt-secure train --resume {directory.path}`, then audit",
        )
    text = load_federated_text(config.data, seed=config.seed, cache=cache, progress=progress)
    planted = load_planted(directory)
    if plant(text, planted).digest != checkpoint.data_digest:
        raise RunDirectoryError(
            f"{directory.path} was trained on another text than the one found now",
            hint="restore the data (and audit/planted.json, if the run has planted records)",
        )
    models = load_models(config, cache=cache, progress=progress)
    models.small.load_adapter_vector(released_adapter(checkpoint, config))
    return Subject(
        directory=directory,
        config=config,
        statement=directory.read_json(statement_path),
        text=text,
        planted=planted,
        models=models,
        schedule=cohort_schedule(
            text.client_ids, rounds=config.federation.rounds, cohort=config.federation.agreed_cohort, seed=config.seed
        ),
        survivors=tuple(tuple(line["survivors"]) for line in directory.read_log("transcript")),
        adapter=released_adapter(checkpoint, config),
        run_id=checkpoint.run_id,
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """What the audit holds the run to.

    Attributes:
        epsilon: None where nothing is claimed.
        noise_multiplier: that proves it, a step; None where no noise is claimed.
        sampling_rate, steps: of the client that was used most.
        source: `privacy.json`, or `--claimed-epsilon`.
    """

    epsilon: float | None
    delta: float
    unit: str
    neighbouring: str
    noise_multiplier: float | None
    sampling_rate: float
    steps: int
    source: str

    def to_json(self) -> dict[str, Any]:
        """As in the audit's result."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "neighbouring": self.neighbouring,
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
            "source": self.source,
        }


def claim_of(statement: dict[str, Any], claimed_epsilon: float | None) -> Claim:
    """The run's own promise, or another one that it is held to.

    Raises:
        PrivacyError: no noise would prove the claimed epsilon.
        RunDirectoryError: the statement lacks what a claim is made of.
    """
    from fedpt_secure.privacy import calibrate_noise

    try:
        delta, rate, steps = float(statement["delta"]), float(statement["sampling_rate"]), int(statement["steps"])
        own = statement["epsilon"] if statement["private"] else None
        multiplier = float(statement["noise_multiplier"]) if own is not None else None
        unit, neighbouring = str(statement["unit"]), str(statement["neighbouring"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"privacy.json is damaged: {error!r}", hint="train again") from None
    if claimed_epsilon is None:
        return Claim(own, delta, unit, neighbouring, multiplier, rate, steps, "privacy.json")
    needed = None
    if math.isfinite(claimed_epsilon):
        needed = calibrate_noise(epsilon=claimed_epsilon, delta=delta, sampling_rate=rate, steps=max(1, steps))
    return Claim(claimed_epsilon, delta, unit, neighbouring, needed, rate, steps, "--claimed-epsilon")
