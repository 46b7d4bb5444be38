"""How a server reaches its clients. A transport carries bytes and understands none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeVar

import msgspec

from fedpt_secure.crypto.structs import resolved
from fedpt_secure.errors import RoundError

LARGEST_BODY = 1 << 30
HELLO = "hello"
"""Who is there: the only message that goes to somebody whose id is not known yet."""
SETTLE = "settle"
"""All rounds below a number are durable at the server."""


@resolved
class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a client is asked: a phase of a round (`federation.PHASES`), `hello` or `settle`, and the phase's bytes."""

    phase: str
    body: bytes

    def to_bytes(self) -> bytes:
        """The wire form."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Request:
        """Decode.

        Raises:
            RoundError: not a request.
        """
        return _decode(content, cls)


@resolved
class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a client answers.

    Attributes:
        kind: `answer` with the phase's bytes; `declined` with one word of reason in `code`, which the owner's budget
            gives; `silent` with one word of what went wrong. No sentence leaves a client: it could tell of its records.
    """

    kind: Literal["answer", "declined", "silent"]
    body: bytes = b""
    code: str = ""

    def to_bytes(self) -> bytes:
        """The wire form."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Reply:
        """Decode.

        Raises:
            RoundError: not a reply.
        """
        return _decode(content, cls)


@resolved
class Settle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The body of a `settle`: the results of all rounds below `rounds_done` are durable at the server."""

    run_id: bytes
    rounds_done: int

    def to_bytes(self) -> bytes:
        """The wire form."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Settle:
        """Decode.

        Raises:
            RoundError: not a settle.
        """
        return _decode(content, cls)


class Transport(Protocol):
    """Carries requests to clients, all at once, and their replies back."""

    def gather(self, hello: bytes, accept: Callable[[bytes], str | None], *, seconds: float) -> frozenset[str]:
        """Ask everybody who can be reached and is not known yet who they are.

        Args:
            hello: the body of the `hello` request.
            accept: the client id that an answer proves, or None.
            seconds: how long to wait for answers.

        Returns the ids of all clients that can be reached now.
        """

    def exchange(
        self,
        phase: str,
        down: Mapping[str, bytes],
        receive: Callable[[str, Reply], None],
        *,
        seconds: float,
    ) -> None:
        """Send each client its bytes; return once all have replied, or the time is over.

        `receive` is called in this thread, as each reply comes; a reply that comes later is dropped. A client that
        cannot be reached is not waited for.
        """


_Message = TypeVar("_Message", Request, Reply, Settle)


def _decode(content: bytes, kind: type[_Message]) -> _Message:
    if len(content) > LARGEST_BODY:
        raise RoundError(f"a message of {len(content)} bytes is larger than {LARGEST_BODY}")
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RoundError(f"not a {kind.__name__.lower()}: {error}") from None
