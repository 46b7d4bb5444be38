"""The server's run over clients on other machines: gather, round after round, publish. Killed, it goes on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import Hello, MessageError, Roster, proven_id
from fedpt_secure.data import Cache
from fedpt_secure.errors import RoundError, RunDirectoryError
from fedpt_secure.federation import ClientTerms, RunDirectory
from fedpt_secure.federation.aggregation import Aggregation, aggregation_of
from fedpt_secure.federation.outcome import (
    completed_rounds,
    publish,
    record_round,
    round_server,
    statement_of,
    take_step,
)
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import RunModels, TrainingModels, load_models, load_training_models
from fedpt_secure.federation.state import RunState, restore, save
from fedpt_secure.federation.terms import agreed_terms, calibrate
from fedpt_secure.federation.transcript import PHASES
from fedpt_secure.network.folder import Patience, ServerFolder
from fedpt_secure.network.journal import Began, Closed, Entry, Lost, RoundJournal
from fedpt_secure.network.network_round import carry_round
from fedpt_secure.network.observer import Observer
from fedpt_secure.network.terms import network_config, network_digest, require_meaningful
from fedpt_secure.network.transport import SETTLE, Settle, Transport
from fedpt_secure.privacy import GaussianSteps, PrivacyStatement, Release
from fedpt_secure.progress import Progress

SECONDS_BETWEEN_HELLOS = 1.0


@dataclass(frozen=True, slots=True)
class FederationResult:
    """What a finished run yields.

    Attributes:
        statement: over every round that a client was asked in, whether or not its update arrived: at least what the
            clients' ledgers say.
        transcripts: one entry per round, as in `transcript.jsonl`.
    """

    config: RunConfig
    statement: PrivacyStatement
    aggregation: Aggregation
    transcripts: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]
    dimension: int


def run_federation(
    folder: ServerFolder, transport: Transport, *, progress: Progress, cache: Cache | None = None
) -> FederationResult:
    """Train with the roster's clients, or go on where the run directory's checkpoint and journal stand.

    Raises:
        FedptError: settings or promise that do not fit; too few clients for longer than `patience.give_up_seconds`
            (start it again, and it goes on); every round was aborted.
    """
    roster = folder.roster()
    config = network_config(folder.config(), clients=len(roster))
    require_meaningful(config, records_at_most=folder.settings().records_at_most, clients=len(roster))
    if (folder.run / "config.toml").is_file():
        directory = RunDirectory.open(folder.run)
        directory.require_settings(config.model_dump(exclude_none=True))
    else:
        directory = RunDirectory.create(folder.run, config)
    with directory.locked():
        observer = Observer(folder, roster, config)
        try:
            return _Coordinator(folder, directory, config, roster, transport, observer, progress, cache).run()
        except BaseException as error:
            observer.failed(error)
            raise


class _Coordinator:
    def __init__(
        self,
        folder: ServerFolder,
        directory: RunDirectory,
        config: RunConfig,
        roster: Roster,
        transport: Transport,
        observer: Observer,
        progress: Progress,
        cache: Cache | None,
    ) -> None:
        began = time.perf_counter()
        self._directory, self._config, self._roster = directory, config, roster
        self._transport, self._observer, self._progress = transport, observer, progress
        settings = folder.settings()
        self._patience: Patience = settings.patience
        self._aggregation = aggregation_of(config)
        federation = config.federation
        schedule = cohort_schedule(
            tuple(roster), rounds=federation.rounds, cohort=federation.agreed_cohort, seed=config.seed
        )
        noise_multiplier = calibrate(config, schedule)
        load = load_models if config.proxy.distill_steps else load_training_models
        self._models: RunModels | TrainingModels = load(config, cache=cache or Cache(), progress=progress)
        self._small = self._models.small
        self._digest = roster.digest.hex()
        self._state: RunState = restore(directory, config, self._digest, self._small)
        self._terms: ClientTerms = agreed_terms(
            config,
            tuple(roster),
            schedule,
            run_id=self._state.run_id,
            small=self._small,
            noise_multiplier=noise_multiplier,
        )
        self._network_digest = network_digest(self._terms, settings.records_at_most)
        self._require_counted_as(self._terms.mechanism.cost)
        if not config.insecure_deterministic:
            observer.priced(self._terms.mechanism.cost, config.privacy.delta)
        if self._state.new:
            directory.save_config(config)
            save(directory, self._state, config, self._digest, self._small)
        self._journal = RoundJournal(directory.path / "journal")
        self._starts = directory.count_start()
        self._state.add_seconds("prepare", time.perf_counter() - began)

    def run(self) -> FederationResult:
        rounds = self._config.federation.rounds
        self._observer.resumed(self._directory.read_log("transcript"))
        with self._progress.task("rounds", rounds, unit="rounds") as bar:
            bar.advance(self._state.rounds_done)
            while self._state.rounds_done < rounds:
                began = time.perf_counter()
                round_index = self._state.rounds_done
                aborted = self._round(round_index, began)
                bar.describe(f"round {round_index}" + (f" aborted: {aborted}" if aborted else ""))
                bar.advance()
        transcripts = completed_rounds(self._directory)
        statement = statement_of(self._terms, self._asked(transcripts), transcripts)
        publish(self._directory, statement, self._aggregation, self._state, self._small)
        self._settle()
        self._observer.done(statement.claim())
        return FederationResult(
            self._config,
            statement,
            self._aggregation,
            transcripts,
            dict(self._state.seconds),
            self._small.dimension,
        )

    def _round(self, round_index: int, began: float) -> str:
        """One round, from its cohort's gathering to the checkpoint; why it was aborted, or nothing."""
        state, small = self._state, self._small
        cohort = self._terms.schedule[round_index]
        known = self._journal.entries()
        begun = next((entry for entry in known if isinstance(entry, Began)), None)
        if begun is not None and begun.round_index != round_index:
            self._journal.remove()  # of a round whose result is durable
            known, begun = [], None
        if not any(isinstance(entry, Closed) and entry.phase == PHASES[-1] for entry in known):
            self._gather(round_index, cohort, known)
        server = round_server(
            self._terms,
            self._roster,
            state,
            small,
            round_index=round_index,
            attempt=self._starts if begun is None else begun.attempt,
        )
        aggregate, transcript = carry_round(
            server, self._transport, self._journal, self._patience, watcher=self._observer
        )
        if aggregate is not None:
            take_step(self._config, state, small, aggregate, round_index, distil=self._distillation(round_index))
        record_round(
            self._directory,
            self._config,
            self._aggregation,
            state,
            small,
            transcript,
            data_digest=self._digest,
            seconds=time.perf_counter() - began,
            noted={"cost": _told(self._terms.mechanism.cost)},
        )
        self._journal.remove()
        self._observer.round_over(transcript)
        return transcript.aborted

    def _gather(self, round_index: int, cohort: Sequence[str], known: Sequence[Entry]) -> None:
        """Wait for the round's cohort; begin with fewer only where the round can still succeed.

        Args:
            known: of a round that an earlier process began. Its clients may be training, and answer no hello before
                they are done: they are waited for as long as for the training itself.

        Raises:
            RoundError: too few for too long.
        """
        patience, needed = self._patience, self._config.federation.agreed_survivors
        lost = {entry.client_id for entry in known if isinstance(entry, Lost)}
        wanted = set(cohort) - lost
        enough = max(patience.gather_seconds, patience.training_seconds) if known else patience.gather_seconds
        began = time.monotonic()
        hello = Hello(self._state.run_id, self._network_digest, self._roster.digest, secrets.token_bytes(32))
        accept = partial(_proven, hello=hello, roster=self._roster)
        while True:
            here = self._transport.gather(hello.to_bytes(), accept, seconds=SECONDS_BETWEEN_HELLOS * 10)
            present = here & wanted
            self._observer.gathering(round_index, here)
            waited = time.monotonic() - began
            if present == wanted or (len(present) >= needed and waited > enough):
                return
            if waited > max(patience.give_up_seconds, enough if known else 0.0):
                if known or patience.then == "skip":
                    return  # the round is asked of whoever is there, aborted, and over
                raise RoundError(
                    f"{len(present)} of the {len(cohort)} clients of round {round_index} are there after {waited:.0f} s"
                    f"; {needed} are needed",
                    hint="start it again once they are, and it goes on with this round; or, where they have left for "
                    "good, patience.then = 'skip' in federation.toml",
                )
            time.sleep(SECONDS_BETWEEN_HELLOS)

    def _require_counted_as(self, cost: GaussianSteps) -> None:
        """Refuse to go on where rounds so far had other noise than this program would give them.

        Raises:
            RunDirectoryError: a round's transcript has another cost, as after an update that calibrates otherwise.
        """
        for line in self._directory.read_log("transcript"):
            if line.get("cost") != _told(cost):
                raise RunDirectoryError(
                    f"round {line['round']} cost its clients {line.get('cost')}, where this program would count "
                    f"{_told(cost)}",
                    hint="go on with the version that began the run, or start a new run",
                )

    def _distillation(self, round_index: int) -> Callable[[], object] | None:
        if isinstance(self._models, RunModels):
            return partial(self._models.distil, self._config, round_index, self._progress)
        return None

    def _asked(self, transcripts: Sequence[Mapping[str, Any]]) -> dict[str, list[Release]]:
        """A release for every round that a client may have released in: all that it was in the cohort of."""
        config = self._config
        released: dict[str, list[Release]] = {}
        for line in transcripts:
            for client in line["cohort"]:
                release = Release(
                    line["round"], self._terms.mechanism.cost, config.privacy.mode, not config.insecure_deterministic
                )
                released.setdefault(client, []).append(release)
        return released

    def _settle(self) -> None:
        """Tell whoever is there that nothing will be asked for again. Whoever is not keeps one update more."""
        body = Settle(self._state.run_id, self._state.rounds_done).to_bytes()
        self._transport.exchange(
            SETTLE,
            dict.fromkeys(self._roster, body),
            lambda client, reply: None,
            seconds=self._patience.phase_seconds,
        )


def _told(cost: GaussianSteps) -> list[float]:
    return [cost.noise_multiplier, cost.sampling_rate, cost.steps]


def _proven(answer: bytes, *, hello: Hello, roster: Roster) -> str | None:
    try:
        return proven_id(answer, hello, roster)
    except MessageError:
        return None
