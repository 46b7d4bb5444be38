"""The local engine: all clients on this machine, one after the other, over the bytes that a network would carry."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.errors import AlreadyReleased, BudgetExceeded, RoundError
from fedpt_secure.federation.client import ClientWorker
from fedpt_secure.federation.server import AggregationServer, RoundAggregate
from fedpt_secure.federation.transcript import PHASES, Transcript
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.progress import Progress, Task


def draw_dropouts(cohort: Sequence[str], *, dropout: float, seed: int, round_index: int) -> dict[str, str]:
    """Decide which clients vanish in a round and before answering which phase (a simulation of bad networks)."""
    rng = simulation_rng("dropout", seed, str(round_index))
    return {client: PHASES[rng.integers(len(PHASES))] for client in cohort if rng.random() < dropout}


def run_round(
    server: AggregationServer,
    workers: Mapping[str, ClientWorker],
    small: SmallLM,
    *,
    dropouts: Mapping[str, str],
    progress: Progress,
    watch_message: Callable[[str, str, bytes], None] = lambda phase, client_id, message: None,
) -> tuple[RoundAggregate | None, Transcript]:
    """Carry one round's bytes between the server and its cohort.

    Args:
        workers: the cohort's clients by id.
        small: the model that simulated clients take turns to train; every client loads the announced adapter.
        dropouts: client -> the phase before which it vanishes.
        watch_message: told every message that reaches the server (phase, client, content), for an audit.

    Returns the mean update, or None if the round was aborted, and the transcript.

    Raises:
        LedgerError: a simulated client's disk failed. A real client would fall silent; here it is this machine's disk.
    """
    transcript = Transcript(server.context.round_index, server.context.cohort)
    carrier = _Carrier(server, workers, dropouts, transcript, watch_message)
    try:
        with progress.task("clients", len(workers), unit="clients") as task:
            aggregate = _phases(carrier, small, task)
        transcript.survivors = aggregate.survivors
    except RoundError as error:
        aggregate = None
        transcript.abort(error.message)
    finally:
        for worker in workers.values():
            worker.discard()
    transcript.rejected = list(server.rejected)
    return aggregate, transcript


def _phases(carrier: _Carrier, small: SmallLM, task: Task) -> RoundAggregate:
    server = carrier.server
    down: Mapping[str, bytes] = dict.fromkeys(carrier.workers, server.announcement)
    carrier.phase("advertise", down, lambda worker, message: worker.announce(message, small))
    down = dict.fromkeys(carrier.alive, server.publish_keys())
    carrier.phase("share_keys", down, lambda worker, message: worker.share_keys(message))
    down = server.route_shares()

    def train(worker: ClientWorker, message: bytes) -> bytes:
        answer = worker.train_and_mask(message, small)
        task.advance()
        return answer

    carrier.phase("mask", down, train)
    down = dict.fromkeys(carrier.alive, server.publish_survivors())
    carrier.phase("confirm", down, lambda worker, message: worker.confirm(message))
    down = dict.fromkeys(carrier.alive, server.publish_confirmations())
    carrier.phase("unmask", down, lambda worker, message: worker.unmask(message))
    began = time.perf_counter()
    aggregate = server.aggregate()
    carrier.transcript.seconds["aggregate"] = time.perf_counter() - began
    return aggregate


@dataclass(slots=True)
class _Carrier:
    """Delivers one phase's messages, counts them, and notes who fell silent."""

    server: AggregationServer
    workers: Mapping[str, ClientWorker]
    dropouts: Mapping[str, str]
    transcript: Transcript
    watch_message: Callable[[str, str, bytes], None]

    @property
    def alive(self) -> list[str]:
        return [client for client in self.workers if client not in self.transcript.dropped]

    def phase(self, name: str, down: Mapping[str, bytes], answer: Callable[[ClientWorker, bytes], bytes]) -> None:
        began = time.perf_counter()
        for client in self.alive:
            if client not in down:
                self.transcript.dropped[client] = f"{name}: the server had nothing for it"
                continue
            message = down[client]
            self.transcript.count_down(client, message)
            if self.dropouts.get(client) == name:
                self.transcript.dropped[client] = f"{name}: vanished"
                continue
            try:
                response = answer(self.workers[client], message)
            except BudgetExceeded as error:
                # What it has spent tells of other runs and servers: one word leaves the client, the numbers do not.
                self.transcript.declined[client] = error.decline_code
                self.transcript.dropped[client] = f"{name}: declined ({error.decline_code})"
                continue
            except (RoundError, AlreadyReleased) as error:
                # Silent to the others; its reason stays in the transcript.
                self.transcript.dropped[client] = f"{name}: {error.message}"
                continue
            self.transcript.count_up(client, response)
            self.watch_message(name, client, response)
            self.server.receive(name, client, response)
        self.transcript.seconds[name] = time.perf_counter() - began
