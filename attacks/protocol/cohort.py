"""A cohort to attack: identities, roster, context, and a round that is driven phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpt_secure.crypto import (
    SYSTEM_RANDOM,
    ClientPolicy,
    Identity,
    RandomBytes,
    RingVector,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    default_threshold,
    ring_dtype,
)


class Cohort:
    """`size` clients with identities and a roster, and the means to start rounds among them."""

    def __init__(self, size: int) -> None:
        self.ids = tuple(f"client-{number:02d}" for number in range(size))
        self.identities = {client_id: Identity.generate() for client_id in self.ids}
        self.roster = Roster({name: identity.verify_key_bytes for name, identity in self.identities.items()})

    def context(self, **changes: Any) -> RoundContext:
        settings: dict[str, Any] = {
            "run_id": b"r" * 16,
            "round_index": 0,
            "cohort": self.ids,
            "roster_digest": self.roster.digest,
            "model_digest": b"m" * 32,
            "vector_length": 5,
            "threshold": default_threshold(len(self.ids)),
            "minimum_survivors": 2,
        }
        return RoundContext(**settings | changes)

    def client(
        self,
        client_id: str,
        context: RoundContext,
        *,
        policy: ClientPolicy | None = None,
        random_bytes: RandomBytes = SYSTEM_RANDOM,
        **more: Any,
    ) -> SecAggClient:
        return SecAggClient(
            context=context,
            identity=self.identities[client_id],
            client_id=client_id,
            roster=self.roster,
            policy=policy or ClientPolicy(minimum_cohort=2),
            random_bytes=random_bytes,
            **more,
        )

    def round(self, context: RoundContext | None = None, **client_settings: Any) -> Round:
        context = context or self.context()
        return Round(
            context=context,
            server=SecAggServer(context=context, roster=self.roster),
            clients={name: self.client(name, context, **client_settings) for name in context.cohort},
        )


@dataclass
class Round:
    """One round in the making. Every phase takes who takes part in it; the last message of each kind stays readable."""

    context: RoundContext
    server: SecAggServer
    clients: dict[str, SecAggClient]
    vectors: dict[str, RingVector] = field(default_factory=dict)
    sent: dict[str, dict[str, bytes]] = field(default_factory=dict)
    directory: bytes = b""
    inboxes: dict[str, bytes] = field(default_factory=dict)
    survivor_list: bytes = b""
    confirmations: bytes = b""

    def __post_init__(self) -> None:
        # Test data, nothing secret: a fixed generator makes failures repeatable.
        generator = np.random.default_rng(7)
        bits, length = self.context.ring_bits, self.context.vector_length
        for name in self.context.cohort:
            self.vectors[name] = generator.integers(0, 1 << bits, length, dtype=ring_dtype(bits))

    def server_message(self, phase: str, name: str) -> bytes:
        """What the server last said to a client that enters `phase`; nothing before the first."""
        return {
            "advertise": b"",
            "share": self.directory,
            "mask": self.inboxes.get(name, b""),
            "confirm": self.survivor_list,
            "unmask": self.confirmations,
        }[phase]

    def answer(self, phase: str, name: str, message: bytes) -> bytes:
        """What a client answers to a server's message."""
        client = self.clients[name]
        if phase == "advertise":
            return client.advertise()
        if phase == "mask":
            return client.mask(message, self.vectors[name])
        return {"share": client.share_keys, "confirm": client.confirm, "unmask": client.unmask}[phase](message)

    def hand_in(self, phase: str, name: str, message: bytes) -> None:
        """Give a client's message to the server."""
        receive = {
            "advertise": self.server.receive_advertisement,
            "share": self.server.receive_shares,
            "mask": self.server.receive_masked,
            "confirm": self.server.receive_confirmation,
            "unmask": self.server.receive_unmasking,
        }[phase]
        receive(name, message)

    def close(self, phase: str) -> None:
        """Let the server close a phase that still has another one after it."""
        if phase == "advertise":
            self.directory = self.server.publish_keys()
        elif phase == "share":
            self.inboxes = self.server.route_shares()
        elif phase == "mask":
            self.survivor_list = self.server.publish_survivors()
        elif phase == "confirm":
            self.confirmations = self.server.publish_confirmations()

    def _phase(self, phase: str, who: Iterable[str] | None) -> Round:
        sent = self.sent.setdefault(phase, {})
        for name in self.context.cohort if who is None else who:
            sent[name] = self.answer(phase, name, self.server_message(phase, name))
            self.hand_in(phase, name, sent[name])
        self.close(phase)
        return self

    def advertise(self, who: Iterable[str] | None = None) -> Round:
        return self._phase("advertise", who)

    def share(self, who: Iterable[str] | None = None) -> Round:
        return self._phase("share", who)

    def mask(self, who: Iterable[str] | None = None) -> Round:
        return self._phase("mask", who)

    def confirm(self, who: Iterable[str] | None = None) -> Round:
        return self._phase("confirm", who)

    def unmask(self, who: Iterable[str] | None = None) -> Round:
        return self._phase("unmask", who)

    def plain_sum(self, who: Collection[str]) -> RingVector:
        dtype = ring_dtype(self.context.ring_bits)
        total = np.zeros(self.context.vector_length, dtype=dtype)
        for name in who:
            total += self.vectors[name]
        return np.asarray(total & dtype.type((1 << self.context.ring_bits) - 1))


Cohorts = Callable[[int], Cohort]
"""Cohorts by size; one that is asked for again may be the same, for it holds no state."""


def cohorts() -> Cohorts:
    """Cohorts that are made once a size: identities cost time."""
    made: dict[int, Cohort] = {}

    def make(size: int) -> Cohort:
        if size not in made:
            made[size] = Cohort(size)
        return made[size]

    return make
