"""What a server lets see of its run: status, structured log, metrics. It knows names, sizes and times, no content."""

from __future__ import annotations

import datetime
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedpt_secure.config import RunConfig
from fedpt_secure.errors import FedptError
from fedpt_secure.federation import Transcript
from fedpt_secure.network.event_log import EventLog
from fedpt_secure.network.folder import ServerFolder
from fedpt_secure.network.metrics import Metrics
from fedpt_secure.network.network_round import Watcher
from fedpt_secure.network.status import ClientLine, StatusFile, new_status
from fedpt_secure.privacy import GaussianSteps, epsilon_spent, round_up


class Observer(Watcher):
    """Writes down what a coordinator does.

    Args:
        folder: the server's.
        clients: the roster's ids.
        config: the settled configuration.
    """

    def __init__(self, folder: ServerFolder, clients: Collection[str], config: RunConfig) -> None:
        self._log = EventLog(folder.log)
        self._price: tuple[GaussianSteps, float] | None = None
        self._asked: Counter[str] = Counter()
        self._charged: set[int] = set()
        self._epsilons: dict[int, float] = {}
        self._metrics = Metrics.on(folder.settings().metrics_port)
        status = new_status("server", {client: ClientLine() for client in clients})
        status.rounds = config.federation.rounds
        self._file = StatusFile(folder.status, status)
        self._log.write("started", pid=os.getpid(), rounds=status.rounds, clients=len(status.clients))

    def resumed(self, transcripts: Sequence[Mapping[str, Any]]) -> None:
        """Rounds that an earlier process made."""
        for line in transcripts:
            self._charge(line["round"], line["cohort"])
            self._count(line["survivors"], line["dropped"], line["aborted"])
        self._file.status.round_index = len(transcripts)
        self._file.write(now=True)

    def priced(self, cost: GaussianSteps, delta: float) -> None:
        """What a round costs whoever is asked in it, at worst; without this, no epsilon is shown."""
        self._price = (cost, delta)

    def gathering(self, round_index: int, here: Collection[str]) -> None:
        """Who can be reached before a round."""
        status = self._file.status
        status.state, status.round_index, status.phase = "gathering", round_index, ""
        for client, line in status.clients.items():
            line.reachable = client in here
        self._metrics.reachable(len(here))
        self._file.write()

    def phase(self, round_index: int, phase: str, clients: Sequence[str]) -> None:
        """See `Watcher.phase`."""
        status = self._file.status
        status.state, status.round_index, status.phase = "round", round_index, phase
        if phase == "advertise" and round_index not in self._charged:
            self._charge(round_index, clients)  # before anything can have left a client
        for client in clients:
            status.clients[client].phase, status.clients[client].outcome = phase, "asked"
        self._file.write(now=True)
        self._log.write("phase", round=round_index, phase=phase, clients=len(clients))

    def client(self, round_index: int, phase: str, client_id: str, outcome: str, *, size: int = 0) -> None:
        """See `Watcher.client`."""
        line = self._file.status.clients[client_id]
        line.phase, line.outcome = phase, outcome
        if outcome == "answered":
            line.seen = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._metrics.client(phase, outcome, size)
        self._file.write()
        self._log.write("client", round=round_index, phase=phase, client=client_id, outcome=outcome, size=size)

    def closed(self, round_index: int, phase: str, seconds: float) -> None:
        """See `Watcher.closed`."""
        self._metrics.phase(phase, seconds)
        self._log.write("phase_over", round=round_index, phase=phase, seconds=seconds)

    def round_over(self, transcript: Transcript) -> None:
        """A round's result is durable."""
        status = self._file.status
        status.round_index, status.state, status.phase = transcript.round_index + 1, "idle", ""
        status.why = transcript.aborted
        self._count(transcript.survivors, transcript.dropped, transcript.aborted)
        self._metrics.round(aborted=bool(transcript.aborted), survivors=len(transcript.survivors))
        self._file.write(now=True)
        outcome = "aborted" if transcript.aborted else "completed"
        self._log.write(
            "round_over", round=transcript.round_index, outcome=outcome, survivors=len(transcript.survivors)
        )

    def done(self, claim: str) -> None:
        """The run is over."""
        status = self._file.status
        status.state, status.claim, status.why = "done", claim, ""
        self._file.write(now=True)
        self._log.write("done", rounds=status.rounds)

    def failed(self, error: BaseException) -> None:
        """The run stops; it can be gone on with."""
        status = self._file.status
        status.state = "failed"
        status.why = error.message if isinstance(error, FedptError) else type(error).__name__
        self._file.write(now=True)
        self._log.write("failed", why=type(error).__name__)

    def _charge(self, round_index: int, cohort: Collection[str]) -> None:
        """A round costs whoever is asked in it, whether or not an update arrives."""
        self._charged.add(round_index)
        for client in cohort:
            self._asked[client] += 1
            self._file.status.clients[client].epsilon = self._spent(self._asked[client])

    def _count(self, survivors: Collection[str], dropped: Mapping[str, str], aborted: str) -> None:
        status = self._file.status
        status.aborted += bool(aborted)
        for client in survivors:
            status.clients[client].rounds += 1
        for client in dropped:
            status.clients[client].dropped += 1

    def _spent(self, rounds: int) -> float | None:
        """Epsilon of so many rounds, never rounded down; None where it is infinite or unknown."""
        if self._price is None:
            return None
        if rounds not in self._epsilons:
            cost, delta = self._price
            self._epsilons[rounds] = epsilon_spent((replace(cost, steps=cost.steps * rounds),), delta=delta)
        epsilon = self._epsilons[rounds]
        return None if math.isinf(epsilon) else round_up(epsilon)
