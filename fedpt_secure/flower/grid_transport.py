"""How the coordinator reaches clients whose nodes have a mailbox: Flower's grid, or a test's.

Nodes are not clients: which client a node is, it proves by its answer to `hello`, and it is asked again when it has
not answered in order. A node that lies can only lose its own client's messages; what they say is signed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedpt_secure.errors import RoundError
from fedpt_secure.flower.messages import MESSAGE_TYPES
from fedpt_secure.network.transport import HELLO, Reply, Request

_POLL_SECONDS = 0.25
_NODES_SECONDS = 2.0
"""Between looks at which nodes are there."""
_SHORTEST_TTL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What came back for a message.

    Attributes:
        message: its id.
        node: who answered it, as the grid knows; None if nobody did and nobody will.
        content: the bytes of a reply; None for an error, or for what is none of ours.
    """

    message: str
    node: int | None
    content: bytes | None


class Mailbox(Protocol):
    """What carries messages to nodes."""

    def nodes(self) -> frozenset[int]:
        """Those that can be reached now."""

    def send(self, kind: str, bodies: Mapping[int, bytes], *, ttl: float) -> dict[str, int]:
        """Send each node its bytes: message id -> node, without the nodes that nothing could be sent to."""

    def collect(self, messages: Iterable[str]) -> list[Delivery]:
        """What has come back for these messages since the last call, at most once a message; never waits."""

    def forget(self, messages: Iterable[str]) -> None:
        """Nobody will ask for these messages any more."""


class GridTransport:
    """`network.transport.Transport` over a mailbox."""

    def __init__(self, mailbox: Mailbox, *, poll_seconds: float = _POLL_SECONDS) -> None:
        self._mailbox = mailbox
        self._poll_seconds = poll_seconds
        self._nodes: dict[str, int] = {}

    def gather(self, hello: bytes, accept: Callable[[bytes], str | None], *, seconds: float) -> frozenset[str]:
        """Ask nodes that are not known yet who they are; see `Transport.gather`."""
        present = self._mailbox.nodes()
        self._keep(present)
        unknown = present - set(self._nodes.values())
        down = dict.fromkeys(unknown, Request(HELLO, hello).to_bytes())

        def receive(node: int, reply: Reply | None) -> None:
            client = accept(reply.body) if reply is not None and reply.kind == "answer" else None
            if client is not None:
                self._nodes[client] = node

        self._carry(HELLO, down, receive, seconds=seconds)
        return frozenset(self._nodes)

    def exchange(
        self, phase: str, down: Mapping[str, bytes], receive: Callable[[str, Reply], None], *, seconds: float
    ) -> None:
        """Send each client its bytes and wait for the replies; see `Transport.exchange`."""
        clients = {node: client for client, node in self._nodes.items() if client in down}
        bodies = {node: Request(phase, down[client]).to_bytes() for node, client in clients.items()}

        def received(node: int, reply: Reply | None) -> None:
            if reply is None:
                self._nodes.pop(clients[node], None)
                reply = Reply("silent", code="node")
            receive(clients[node], reply)

        self._carry(phase, bodies, received, seconds=seconds)

    def _carry(
        self,
        phase: str,
        bodies: Mapping[int, bytes],
        receive: Callable[[int, Reply | None], None],
        *,
        seconds: float,
    ) -> None:
        """Send, and hand on what comes in time: None from a node that answers with an error or with nonsense."""
        if not bodies:
            return
        start = looked = time.monotonic()
        waiting = self._mailbox.send(MESSAGE_TYPES[phase], bodies, ttl=max(seconds, _SHORTEST_TTL_SECONDS))
        try:
            while waiting:
                for delivery in self._mailbox.collect(tuple(waiting)):
                    node = waiting.get(delivery.message)
                    if node is None or delivery.node not in (None, node):
                        continue  # of another phase, a second time, or in another node's name
                    del waiting[delivery.message]
                    receive(node, _decoded(delivery))
                now = time.monotonic()
                if now - start >= seconds:
                    return
                if now - looked >= _NODES_SECONDS:
                    looked = now
                    waiting = self._still_there(waiting)
                if waiting:
                    time.sleep(min(self._poll_seconds, max(0.0, seconds - (now - start))))
        finally:
            self._mailbox.forget(tuple(waiting))

    def _still_there(self, waiting: dict[str, int]) -> dict[str, int]:
        present = self._mailbox.nodes()
        self._keep(present)
        self._mailbox.forget([message for message, node in waiting.items() if node not in present])
        return {message: node for message, node in waiting.items() if node in present}

    def _keep(self, present: frozenset[int]) -> None:
        self._nodes = {client: node for client, node in self._nodes.items() if node in present}


def _decoded(delivery: Delivery) -> Reply | None:
    if delivery.node is None or delivery.content is None:
        return None
    try:
        return Reply.from_bytes(delivery.content)
    except RoundError:
        return None
