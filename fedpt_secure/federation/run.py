"""One run, from configuration to summary. The reader's entry to the federation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedpt_secure.config import RunConfig
from fedpt_secure.data import Cache, FederatedText, load_federated_text
from fedpt_secure.errors import LedgerError
from fedpt_secure.evaluation import ArmsEvaluation, evaluate_arms
from fedpt_secure.federation.aggregation import Aggregation, aggregation_of
from fedpt_secure.federation.audit_record import AuditRecorder, planted_text
from fedpt_secure.federation.local_engine import draw_dropouts, run_round
from fedpt_secure.federation.mechanisms import RingNoiseMechanism
from fedpt_secure.federation.outcome import (
    completed_rounds,
    publish,
    record_round,
    round_server,
    statement_of,
    take_step,
)
from fedpt_secure.federation.population import Population, build_population
from fedpt_secure.federation.prepared_text import client_examples, held_out_sample, large_examples
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.federation.state import RunState, restore, save
from fedpt_secure.federation.terms import agreed_terms, calibrate, require_meaningful_delta
from fedpt_secure.federation.tiers import require_memory
from fedpt_secure.federation.transcript import Transcript
from fedpt_secure.privacy import GaussianSteps, PrivacyStatement, Release
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import SteeringRule


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run yields; `report` turns it into `summary.json` and tables.

    Attributes:
        statement: the privacy statement over what the clients' ledgers say was spent.
        aggregation: how updates were summed.
        evaluation: losses of the four arms on held-out records.
        transcripts: one entry per round, as in `transcript.jsonl`.
        seconds: wall time by phase of the run, restarts included.
        clients: number of clients; `dimension`: number of trained parameters.
        directions: where LoRA's A came from, `public` or `random`.
        large_source: where the large model's weights came from.
        black_box: where it is, and what this process sent to it (`RunModels.black_box_document`).
    """

    config: RunConfig
    text: FederatedText
    statement: PrivacyStatement
    aggregation: Aggregation
    evaluation: ArmsEvaluation
    transcripts: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]
    dimension: int
    directions: str
    large_source: str
    black_box: Mapping[str, Any]


def run_training(config: RunConfig, directory: RunDirectory, *, cache: Cache, progress: Progress) -> RunResult:
    """Train, or go on from the directory's checkpoint, then evaluate once.

    Raises:
        FedptError: settings, data, models or privacy that do not fit; before training wherever that can be known.
        RoundError: every round was aborted.
    """
    with directory.locked():
        return _run(config, directory, cache, progress)


def _run(config: RunConfig, directory: RunDirectory, cache: Cache, progress: Progress) -> RunResult:
    began = time.perf_counter()
    aggregation = aggregation_of(config)
    # 1. Data, models, and the noise that the promise needs: whatever can fail, fails before anything is trained.
    text = load_federated_text(config.data, seed=config.seed, cache=cache, progress=progress)
    config = config.for_population(len(text.clients))
    schedule = cohort_schedule(
        text.client_ids, rounds=config.federation.rounds, cohort=config.federation.agreed_cohort, seed=config.seed
    )
    text = planted_text(config, text, schedule, directory)
    require_meaningful_delta(config, {client.client_id: len(client.train) for client in text.clients})
    noise_multiplier = calibrate(config, schedule)
    models = load_models(config, cache=cache, progress=progress)
    small = models.small
    if models.source is not None:
        models.black_box(progress)  # an API that cannot be evaluated is missed now, not after the last round
    for client in text.clients:
        client_examples(client, models, config)  # a record that cannot be cut is found now, not in its client's round
    clients = {client.client_id: client for client in text.clients}
    require_memory(config, small)
    state = restore(directory, config, text.digest, small)
    terms = agreed_terms(
        config, text.client_ids, schedule, run_id=state.run_id, small=small, noise_multiplier=noise_multiplier
    )
    recorder = AuditRecorder(directory, config)
    population = build_population(
        terms,
        text,
        lambda client_id: client_examples(clients[client_id], models, config),
        directory=directory,
        recorder=recorder,
        new=state.new,
    )
    mechanism = terms.mechanism
    if isinstance(mechanism, RingNoiseMechanism):
        _require_counted_as(mechanism.cost, population)
    if state.new:
        directory.save_config(config)
        save(directory, state, config, text.digest, small)
    population.settle(state.rounds_done, text.client_ids)
    attempt = directory.count_start()
    state.add_seconds("prepare", time.perf_counter() - began)

    # 2. Rounds. What is shown after each follows from the sums alone: held-out records are looked at once, at the end.
    with progress.task("rounds", config.federation.rounds, unit="rounds") as bar:
        bar.advance(state.rounds_done)
        for round_index in range(state.rounds_done, config.federation.rounds):
            began = time.perf_counter()
            cohort = schedule[round_index]
            transcript = _round(config, state, models, population, recorder, cohort, round_index, attempt, progress)
            norm = record_round(
                directory,
                config,
                aggregation,
                state,
                small,
                transcript,
                data_digest=text.digest,
                seconds=time.perf_counter() - began,
            )
            population.settle(state.rounds_done, cohort)
            bar.describe(f"adapter norm {norm:.3f}" + (" (round aborted)" if transcript.aborted else ""))
            bar.advance()

    transcripts = completed_rounds(directory)
    releases = population.releases()
    _require_counted(releases, transcripts)
    statement = statement_of(terms, releases, transcripts)
    publish(directory, statement, aggregation, state, small)

    # 3. One look at the held-out records, by all four arms.
    began = time.perf_counter()
    evaluation = evaluate_arms(
        large_examples(held_out_sample(text, config), models, config),
        models.black_box(progress),
        models.pair,
        rules=[SteeringRule.of(config.proxy, responses=config.data.has_prompts)],
        progress=progress,
    )
    state.add_seconds("evaluation", time.perf_counter() - began)
    return RunResult(
        config=config,
        text=text,
        statement=statement,
        aggregation=aggregation,
        evaluation=evaluation,
        transcripts=transcripts,
        seconds=dict(state.seconds),
        dimension=small.dimension,
        directions=small.directions,
        large_source=models.weights.source,
        black_box=models.black_box_document(),
    )


def _round(
    config: RunConfig,
    state: RunState,
    models: RunModels,
    population: Population,
    recorder: AuditRecorder,
    cohort: tuple[str, ...],
    round_index: int,
    attempt: int,
    progress: Progress,
) -> Transcript:
    """One round: the cohort's mean update, then the server's step, then distillation if it is on."""
    small = models.small
    adapter = small.adapter_vector()
    server = round_server(population.terms, population.roster, state, small, round_index=round_index, attempt=attempt)
    recorder.begin(adapter)
    aggregate, transcript = run_round(
        server,
        population.cohort(cohort),
        small,
        dropouts=draw_dropouts(cohort, dropout=config.federation.dropout, seed=config.seed, round_index=round_index),
        progress=progress,
        watch_message=partial(recorder.message, round_index),
    )
    recorder.end(round_index, None if aggregate is None else aggregate.mean_update)
    small.load_adapter_vector(adapter)
    if aggregate is not None:
        distil = partial(models.distil, config, round_index, progress) if config.proxy.distill_steps else None
        take_step(config, state, small, aggregate, round_index, distil=distil)
    return transcript


def _require_counted_as(cost: GaussianSteps, population: Population) -> None:
    """Refuse to go on where rounds so far had other noise than this program would give them.

    Raises:
        LedgerError: a client's ledger counts another cost, as after an update that calibrates otherwise.
    """
    for client, releases in population.releases().items():
        for release in releases:
            if release.spent != cost:
                raise LedgerError(
                    f"the ledger of client {client} counts {release.spent} for round {release.round_index}, where this "
                    f"program would count {cost}",
                    hint="go on with the version that began the run, or start a new run",
                )


def _require_counted(releases: Mapping[str, Sequence[Release]], transcripts: Sequence[Mapping[str, Any]]) -> None:
    """Every update that was summed must stand in its client's ledger.

    Raises:
        LedgerError: a client's update is in a sum but not in its ledger.
    """
    for line in transcripts:
        for client in line["survivors"]:
            if line["round"] not in {release.round_index for release in releases.get(client, ())}:
                raise LedgerError(
                    f"the ledger of client {client} does not know its update in round {line['round']}",
                    hint="restore the run's clients/ folder; no epsilon can be stated without it",
                )
