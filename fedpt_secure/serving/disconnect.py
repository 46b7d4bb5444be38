"""Work that ends when its client leaves, and streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody is left to answer."""


async def unless_disconnected(
    work: Coroutine[Any, Any, Result], receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
) -> Result:
    """The result of some work, which is cancelled when the client leaves.

    Args:
        work: started at once.
        receive: the request's, its body already read.

    Raises:
        ClientGone: the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _departure(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the source is closed when the client leaves, also while it is silent.

    (Starlette's own stream notices only at its next write, which a queued answer may not make for minutes.)
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            await unless_disconnected(self._send_all(send), receive)

    async def _send_all(self, send: Any) -> None:
        async for content in self._events:
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
