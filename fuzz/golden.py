"""The committed test vectors as contexts, rosters, messages and machines that stand at any phase of their rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedpt_secure.crypto import (
    ClientPolicy,
    Identity,
    InsecureDeterministicBytes,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    ring_dtype,
)

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "secagg_v1.json"


class TrustingRoster(Roster):
    """A roster for which every signature is good, so that a fuzzer gets behind the check that it cannot pass."""

    def verify(self, client_id: str, message: bytes, signature: bytes) -> None:
        """Accept."""


@dataclass(frozen=True)
class GoldenRound:
    """One whole round: what every party said, and from which secrets."""

    content: dict[str, Any]
    context: RoundContext
    roster: Roster

    def sent(self, kind: str) -> dict[str, bytes]:
        """Messages of one kind, by client."""
        return {name: bytes.fromhex(text) for name, text in self.content["messages"][kind].items()}

    def said(self, kind: str) -> bytes:
        """The server's one message of a kind."""
        return bytes.fromhex(self.content["messages"][kind])

    def messages(self, kind: str) -> list[bytes]:
        """All messages of one kind, the server's or the clients'."""
        return [self.said(kind)] if isinstance(self.content["messages"][kind], str) else list(self.sent(kind).values())

    def server_phases(self) -> Iterator[tuple[Callable[[SecAggServer], Any], dict[str, bytes], Callable[..., Any]]]:
        """For each phase: the method that takes a message, the messages by client, and the method that closes it."""
        yield SecAggServer.receive_advertisement, self.sent("advertisements"), SecAggServer.publish_keys
        yield SecAggServer.receive_shares, self.sent("sealed_shares"), SecAggServer.route_shares
        yield SecAggServer.receive_masked, self.sent("masked_vectors"), SecAggServer.publish_survivors
        yield (
            SecAggServer.receive_confirmation,
            self.sent("confirmations_of_clients"),
            SecAggServer.publish_confirmations,
        )
        yield SecAggServer.receive_unmasking, self.sent("unmasking_shares"), SecAggServer.aggregate

    def server(self) -> SecAggServer:
        """A fresh server that believes every signature."""
        return SecAggServer(context=self.context, roster=self.roster)

    def client(self, name: str) -> SecAggClient:
        """A fresh client with the vectors' secrets; it too believes every signature."""
        return SecAggClient(
            context=self.context,
            identity=Identity(bytes.fromhex(self.content["identity_seeds"][name])),
            client_id=name,
            roster=self.roster,
            policy=ClientPolicy(),
            random_bytes=InsecureDeterministicBytes(bytes.fromhex(self.content["random_keys"][name])),
        )

    def client_steps(self, name: str) -> list[tuple[Callable[[SecAggClient, bytes], bytes], bytes]]:
        """For each phase after the first: what the client does with the server's message, and that message."""
        vector = np.array(self.content["vectors"][name], dtype=ring_dtype(self.context.ring_bits))
        return [
            (SecAggClient.share_keys, self.said("key_directory")),
            (lambda client, inbox: client.mask(inbox, vector), self.sent("inboxes")[name]),
            (SecAggClient.confirm, self.said("survivor_list")),
            (SecAggClient.unmask, self.said("confirmations")),
        ]


@cache
def rounds() -> tuple[GoldenRound, ...]:
    """The complete graph's round first, then the k-regular one."""
    content = json.loads(VECTORS.read_text())
    return tuple(
        GoldenRound(
            each,
            RoundContext.from_bytes(bytes.fromhex(each["context_bytes"])),
            TrustingRoster(dict(Roster.from_json(each["roster_file"].encode()))),
        )
        for each in content["rounds"].values()
    )
