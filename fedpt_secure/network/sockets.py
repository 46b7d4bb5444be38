"""A transport where all workers are on this machine: their sockets, without anything between. For trials and tests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedpt_secure.errors import RoundError
from fedpt_secure.network.local_socket import ask
from fedpt_secure.network.transport import HELLO, LARGEST_BODY, Reply, Request


class SocketTransport:
    """Asks workers through their sockets, each in a thread of its own.

    Args:
        sockets: where workers may listen; who they are, they say themselves.
    """

    def __init__(self, sockets: tuple[Path, ...]) -> None:
        self._sockets = sockets
        self._known: dict[str, Path] = {}

    def gather(self, hello: bytes, accept: Callable[[bytes], str | None], *, seconds: float) -> frozenset[str]:
        """See `Transport.gather`."""
        unknown = [path for path in self._sockets if path not in self._known.values() and path.exists()]
        replies = self._ask_all({str(path): (path, Request(HELLO, hello)) for path in unknown}, seconds)
        for place, reply in replies:
            client = accept(reply.body) if reply.kind == "answer" else None
            if client is not None and client not in self._known:
                self._known[client] = Path(place)
        return frozenset(client for client, path in self._known.items() if path.exists())

    def exchange(
        self, phase: str, down: Mapping[str, bytes], receive: Callable[[str, Reply], None], *, seconds: float
    ) -> None:
        """See `Transport.exchange`."""
        asked = {
            client: (self._known[client], Request(phase, body))
            for client, body in down.items()
            if client in self._known
        }
        for client, reply in self._ask_all(asked, seconds):
            receive(client, reply)

    def _ask_all(self, asked: Mapping[str, tuple[Path, Request]], seconds: float) -> Iterator[tuple[str, Reply]]:
        """Yield replies as they come, until all are there or the time is over. Who cannot be asked is forgotten."""
        answers: queue.SimpleQueue[tuple[str, Reply | None]] = queue.SimpleQueue()

        def one(name: str, path: Path, request: Request) -> None:
            try:
                reply = Reply.from_bytes(ask(path, request.to_bytes(), seconds=seconds, largest=LARGEST_BODY))
            except RoundError:
                answers.put((name, None))
            else:
                answers.put((name, reply))

        for name, (path, request) in asked.items():
            threading.Thread(target=one, args=(name, path, request), daemon=True).start()
        end = time.monotonic() + seconds
        waiting = set(asked)
        while waiting:
            try:
                name, reply = answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            waiting.discard(name)
            if reply is None:
                self._known.pop(name, None)
            else:
                yield name, reply
