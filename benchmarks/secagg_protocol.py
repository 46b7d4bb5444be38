"""Whole rounds in one machine: clients one after the other in this process, the server in a process of its own.

The server's process holds nothing but the server, so that its peak resident set is the server's memory; no more than
one client's vector exists at a time.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from secagg_timing import check_sum, count_cpu_time, timed

from fedpt_secure.crypto import (
    ClientPolicy,
    FixedPointEncoding,
    Identity,
    RingVector,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    SecureAggregationParameters,
    secure_aggregation_parameters,
)

CORRUPT_FRACTION = 0.05
DROPOUT_FRACTION = 0.05
RING_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolCost:
    """One round.

    Attributes:
        n: clients.
        elements: of the vector.
        dropouts: clients lost after they shared their keys, the worst moment for the server.
        degree: neighbours of a client; n - 1 in the complete graph.
        threshold: shares that rebuild a secret.
        client_seconds: one client's time in all phases, encoding included, on one thread; the mean over clients.
        client_bytes: that one surviving client sends.
        client_bytes_received: that it receives.
        server_seconds: the server's time in all calls.
        unmask_seconds: of these, rebuilding secrets and taking the masks off the sum.
        server_peak_mb: growth of the server process's resident set, at its highest, in 10^6 bytes; None where the
            system does not tell.
        phase_seconds: client_seconds by phase.
    """

    n: int
    elements: int
    dropouts: int
    degree: int
    threshold: int
    client_seconds: float
    client_bytes: int
    client_bytes_received: int
    server_seconds: float
    unmask_seconds: float
    server_peak_mb: float | None
    phase_seconds: dict[str, float]


class Cohort:
    """`size` clients and the context of one round among them."""

    def __init__(self, size: int, elements: int) -> None:
        self.ids = tuple(f"client-{number:05d}" for number in range(size))
        self._identities = {name: Identity.generate() for name in self.ids}
        self.roster = Roster({name: identity.verify_key_bytes for name, identity in self._identities.items()})
        self.parameters: SecureAggregationParameters = secure_aggregation_parameters(
            size, CORRUPT_FRACTION, max(DROPOUT_FRACTION, 1 / size)
        )
        lost = max(1, int(DROPOUT_FRACTION * size))
        self.dropouts = frozenset(self.ids[number * size // lost] for number in range(lost))
        self.survivors = tuple(name for name in self.ids if name not in self.dropouts)
        self.context = RoundContext(
            run_id=b"benchmark".ljust(16, b"."),
            round_index=0,
            cohort=self.ids,
            roster_digest=self.roster.digest,
            model_digest=bytes(32),
            vector_length=elements,
            ring_bits=RING_BITS,
            threshold=self.parameters.threshold,
            minimum_survivors=self.parameters.minimum_survivors,
            degree=self.parameters.degree,
        )
        self.encoding = FixedPointEncoding(ring_bits=RING_BITS, bound=1.0, cohort=size)
        self._pattern = np.linspace(-1, 1, elements, dtype=np.float32)

    def client(self, name: str, *, workers: int = 1) -> SecAggClient:
        """A client with the floors that the parameters give."""
        policy = ClientPolicy(
            minimum_survivors=self.parameters.minimum_survivors,
            tolerated_corruptions=self.parameters.tolerated_corruptions,
            tolerated_corrupt_clients=self.parameters.tolerated_corrupt_clients,
        )
        return SecAggClient(
            context=self.context,
            identity=self._identities[name],
            client_id=name,
            roster=self.roster,
            policy=policy,
            workers=workers,
        )

    def values(self, name: str) -> np.ndarray:
        """One client's float32 vector, another for each."""
        return self._pattern * np.float32((self.ids.index(name) + 1) / len(self.ids))


class RemoteServer:
    """A `SecAggServer` in a process of its own; its methods are called by name."""

    def __init__(self, cohort: Cohort, workers: int, *, cpu_time: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, cohort.context.to_bytes(), cohort.roster.to_json(), workers, cpu_time)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the server's `method` returns. A ring vector stays there until `total` asks for it."""
        self._connection.send((method, arguments))
        return self._connection.recv()

    def report(self) -> tuple[dict[str, float], float | None]:
        """Seconds by method, and the growth of the resident set at its peak, in bytes."""
        return self.call("report")

    def total(self) -> RingVector:
        """The sum that `aggregate` computed."""
        return np.frombuffer(self.call("total"), dtype=np.uint32)


def _serve(connection: Connection, context: bytes, roster: bytes, workers: int, cpu_time: bool) -> None:
    if cpu_time:
        count_cpu_time()
    server = SecAggServer(context=RoundContext.from_bytes(context), roster=Roster.from_json(roster), workers=workers)
    seconds: dict[str, float] = defaultdict(float)
    total: RingVector = np.zeros(0, dtype=np.uint32)
    before = _resident("VmRSS", reset_peak=True)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        if method == "report":
            peak = _resident("VmHWM")
            connection.send((dict(seconds), None if before is None or peak is None else peak - before))
            continue
        if method == "total":
            connection.send(total.tobytes())
            continue
        spent, result = timed(getattr(server, method), *arguments)
        seconds[method] += spent
        if isinstance(result, np.ndarray):
            total, result = result, None
        connection.send(result)
        # A server lets go of one message before it reads the next.
        arguments = result = None


def _resident(field_name: str, *, reset_peak: bool = False) -> int | None:
    """A field of Linux's account of this process's resident memory, in bytes; None on other systems."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field_name))


def measure_protocol(
    n: int, elements: int, workers: int, advance: Callable[[], None], *, cpu_time: bool = False
) -> ProtocolCost:
    """Run one round of `n` clients and check its sum. `advance` is called 5 times a client.

    Raises:
        WrongSum: the server's sum is not that of the survivors' vectors.
    """
    cohort = Cohort(n, elements)
    expected = np.zeros(elements, dtype=np.uint32)
    phases: dict[str, float] = defaultdict(float)
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)
    clients = {name: cohort.client(name) for name in cohort.ids}

    def step(phase: str, name: str, work: Callable[..., bytes], *arguments: Any) -> bytes:
        spent, message = timed(work, *arguments)
        phases[phase] += spent / (n if phase in ("advertise", "share") else len(cohort.survivors))
        received[name] += sum(len(argument) for argument in arguments if isinstance(argument, bytes))
        sent[name] += len(message)
        advance()
        return message

    with RemoteServer(cohort, workers, cpu_time=cpu_time) as server:
        for name in cohort.ids:
            server.call("receive_advertisement", name, step("advertise", name, clients[name].advertise))
        directory = server.call("publish_keys")
        for name in cohort.ids:
            server.call("receive_shares", name, step("share", name, clients[name].share_keys, directory))
        inboxes = server.call("route_shares")
        for name in cohort.survivors:
            spent, vector = timed(cohort.encoding.encode, cohort.values(name))
            phases["encode"] += spent / len(cohort.survivors)
            expected += vector
            server.call("receive_masked", name, step("mask", name, clients[name].mask, inboxes[name], vector))
        survivor_list = server.call("publish_survivors")
        for name in cohort.survivors:
            server.call("receive_confirmation", name, step("confirm", name, clients[name].confirm, survivor_list))
        confirmations = server.call("publish_confirmations")
        for name in cohort.survivors:
            server.call("receive_unmasking", name, step("unmask", name, clients[name].unmask, confirmations))
        server.call("aggregate")
        seconds, peak = server.report()
        check_sum(server.total(), expected, f"{n} clients, {elements} elements")
    one = cohort.survivors[0]
    return ProtocolCost(
        n=n,
        elements=elements,
        dropouts=len(cohort.dropouts),
        degree=cohort.context.degree or n - 1,
        threshold=cohort.context.threshold,
        client_seconds=sum(phases.values()),
        client_bytes=sent[one],
        client_bytes_received=received[one],
        server_seconds=sum(seconds.values()),
        unmask_seconds=seconds["aggregate"],
        server_peak_mb=None if peak is None else peak / 1e6,
        phase_seconds=dict(phases),
    )
