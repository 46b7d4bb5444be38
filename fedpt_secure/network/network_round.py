"""One round between a server and clients on other machines, over any transport, through the server's journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedpt_secure.errors import RoundError
from fedpt_secure.federation import PHASES, AggregationServer, RoundAggregate, Transcript
from fedpt_secure.network.folder import Patience
from fedpt_secure.network.journal import Accepted, Closed, Entry, Lost, Phase, RoundJournal
from fedpt_secure.network.transport import Reply, Transport


class Watcher:
    """Told what happens in a round, for status, logs and metrics. It changes nothing; this one ignores everything."""

    def phase(self, round_index: int, phase: str, clients: Sequence[str]) -> None:
        """A phase begins, which asks these clients."""

    def client(self, round_index: int, phase: str, client_id: str, outcome: str, *, size: int = 0) -> None:
        """A client `answered` (with so many bytes), `declined`, is `silent` or was `refused`."""

    def closed(self, round_index: int, phase: str, seconds: float) -> None:
        """A phase is over."""


def carry_round(
    server: AggregationServer,
    transport: Transport,
    journal: RoundJournal,
    patience: Patience,
    *,
    watcher: Watcher,
) -> tuple[RoundAggregate | None, Transcript]:
    """Carry a round's bytes; go on with one that the journal knows.

    Returns the mean update, or None if the round was aborted, and the transcript.

    Raises:
        RunDirectoryError: the journal is damaged or about another announcement.
        OSError: the journal cannot be written; nothing was acted on that is not in it.
    """
    context = server.context
    transcript = Transcript(context.round_index, context.cohort)
    before = journal.open(context.round_index, context.attempt, server.announcement)
    carrier = _Carrier(server, transport, journal, transcript, watcher, _Known.of(before))
    try:
        aggregate = _phases(carrier, patience)
        transcript.survivors = aggregate.survivors
    except RoundError as error:
        aggregate = None
        transcript.abort(error.message)
    transcript.rejected = list(server.rejected)
    return aggregate, transcript


def _phases(carrier: _Carrier, patience: Patience) -> RoundAggregate:
    server = carrier.server
    short, long = patience.phase_seconds, patience.training_seconds
    carrier.phase("advertise", lambda: dict.fromkeys(carrier.alive, server.announcement), short)
    carrier.phase("share_keys", lambda: _to_all(carrier.alive, server.publish_keys()), short)
    carrier.phase("mask", server.route_shares, long)
    carrier.phase("confirm", lambda: _to_all(carrier.alive, server.publish_survivors()), short)
    carrier.phase("unmask", lambda: _to_all(carrier.alive, server.publish_confirmations()), short)
    began = time.perf_counter()
    aggregate = server.aggregate()
    carrier.transcript.seconds["aggregate"] = time.perf_counter() - began
    return aggregate


def _to_all(clients: Sequence[str], message: bytes) -> dict[str, bytes]:
    return dict.fromkeys(clients, message)


@dataclass(slots=True)
class _Known:
    """What the journal knows of a round."""

    accepted: dict[str, dict[str, bytes]] = field(default_factory=lambda: {phase: {} for phase in PHASES})
    lost: dict[str, dict[str, Lost]] = field(default_factory=lambda: {phase: {} for phase in PHASES})
    closed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> _Known:
        known = cls()
        for entry in entries:
            if isinstance(entry, Accepted):
                known.accepted[entry.phase][entry.client_id] = entry.body
            elif isinstance(entry, Lost):
                known.lost[entry.phase][entry.client_id] = entry
            elif isinstance(entry, Closed):
                known.closed[entry.phase] = entry.seconds
        return known


@dataclass(slots=True)
class _Carrier:
    server: AggregationServer
    transport: Transport
    journal: RoundJournal
    transcript: Transcript
    watcher: Watcher
    known: _Known

    @property
    def alive(self) -> list[str]:
        return [client for client in self.transcript.cohort if client not in self.transcript.dropped]

    def phase(self, name: Phase, messages: Callable[[], Mapping[str, bytes]], seconds: float) -> None:
        """Ask all who are still there, each with its bytes; whoever does not answer well drops out."""
        began, round_index = time.perf_counter(), self.transcript.round_index
        down = messages()
        for client in self.alive:
            if client not in down:
                self.transcript.dropped[client] = f"{name}: the server had nothing for it"
        asked = self.alive
        for client in asked:
            self.transcript.count_down(client, down[client])
        self.watcher.phase(round_index, name, asked)
        waiting = set(asked) - self._replay(name)
        if waiting and name not in self.known.closed:
            self.transport.exchange(
                name,
                {client: down[client] for client in asked if client in waiting},
                lambda client, reply: self._take(name, client, reply, waiting),
                seconds=seconds,
            )
        for client in sorted(waiting):
            self._lose(Lost(name, client, "no answer in time"))
        if name not in self.known.closed:
            self.known.closed[name] = time.perf_counter() - began
            self.journal.write(Closed(name, self.known.closed[name]))
        self.transcript.seconds[name] = self.known.closed[name]
        self.watcher.closed(round_index, name, self.known.closed[name])

    def _replay(self, name: Phase) -> set[str]:
        """Tell the server what it had accepted before it was killed; the clients that need not be asked again."""
        for client, body in self.known.accepted[name].items():
            self.server.receive(name, client, body)
            self.transcript.count_up(client, body)
        for lost in self.known.lost[name].values():
            self._note(lost)
        return {*self.known.accepted[name], *self.known.lost[name]}

    def _take(self, name: Phase, client: str, reply: Reply, waiting: set[str]) -> None:
        if client not in waiting:
            return  # a second reply, or somebody who was not asked
        waiting.discard(client)
        if reply.kind == "declined":
            self._lose(Lost(name, client, f"declined ({_word(reply.code)})", _word(reply.code)))
            return
        if reply.kind == "silent":
            self._lose(Lost(name, client, f"silent ({_word(reply.code)})"))
            return
        refused = len(self.server.rejected)
        self.server.receive(name, client, reply.body)
        if len(self.server.rejected) > refused:
            self._lose(Lost(name, client, "its message was refused"))
            return
        self.journal.write(Accepted(name, client, reply.body))
        self.transcript.count_up(client, reply.body)
        self.watcher.client(self.transcript.round_index, name, client, "answered", size=len(reply.body))

    def _lose(self, lost: Lost) -> None:
        self.journal.write(lost)
        self._note(lost)

    def _note(self, lost: Lost) -> None:
        self.transcript.dropped[lost.client_id] = f"{lost.phase}: {lost.why}"
        if lost.declined:
            self.transcript.declined[lost.client_id] = lost.declined
        outcome = "declined" if lost.declined else ("refused" if "refused" in lost.why else "silent")
        self.watcher.client(self.transcript.round_index, lost.phase, lost.client_id, outcome)


def _word(code: str) -> str:
    """A client's one word, as much of it as is one."""
    return "".join(character for character in code[:16] if character.isascii() and character.isalpha()) or "unknown"
