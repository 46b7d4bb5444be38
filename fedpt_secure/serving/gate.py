"""What stands between the network and the routes: host, key, rate, body, and what is logged.

    host check -> API key -> rate -> content type -> body, whole and bounded -> the routes

Everything that costs memory or time comes after the key has been checked.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedpt_secure.serving.disconnect import ClientGone
from fedpt_secure.serving.errors import ApiError, unexpected
from fedpt_secure.serving.keys import ApiKeys
from fedpt_secure.serving.limits import RateLimit
from fedpt_secure.serving.metrics import Metrics, route_of
from fedpt_secure.serving.settings import ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("fedpt_secure.serving")

OPEN_PATHS = frozenset({"/healthz", "/", "/page.css", "/page.js"})
"""Need no key: they tell nothing about the run."""
_CLIENT_GONE = 499
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Gate:
    """An ASGI application around another one.

    Guarantees: nothing that a client sent is logged, neither path, query, header, body nor the message of an error
    that may quote them; an unexpected error ends in a 500 that tells nothing.

    Args:
        app: the routes.
        settings: the limits.
        keys: asked for on every path but `OPEN_PATHS`, if there is one.
        metrics: counts.
    """

    def __init__(self, app: Any, *, settings: ServeSettings, keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._rate = RateLimit(settings.requests_per_minute)
        self._hosts = _LOOPBACK_NAMES | {settings.host, f"[{settings.host}]"}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            try:
                receive = await self._let_in(scope, receive)
                await self._app(scope, receive, noted)
            except ApiError as error:
                await error.response()(scope, receive, noted)
            except ClientGone:
                status = _CLIENT_GONE
                self._metrics.cancelled.inc()
            except Exception as error:
                self.note_failure(error)
                if not status:
                    await unexpected().response()(scope, receive, noted)
        finally:
            self._note(scope, status or _CLIENT_GONE, time.monotonic() - started)

    def note_failure(self, error: BaseException) -> None:
        """Log where an unexpected error arose; its message may hold a prompt and is left out."""
        self._metrics.failures.inc()
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        logger.error("unexpected %s at %s", type(error).__name__, " <- ".join(reversed(places[-8:])))

    def _note(self, scope: Message, status: int, seconds: float) -> None:
        route = route_of(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        logger.info("%s %s %d %.0f ms", method, route, status, seconds * 1000)

    async def _let_in(self, scope: Message, receive: Receive) -> Receive:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_host(headers)
        if scope["path"] in OPEN_PATHS:
            return receive
        client = self._client(scope, headers)
        if scope["method"] != "POST":
            return receive
        self._rate.take(client)
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "the request body must be application/json")
        return _replayed(await self._body(headers, receive), receive)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """On a loopback address without a key, a page of any web site that points its own name here (DNS rebinding)
        could use the models; such a request carries the site's name."""
        if self._keys or not self._settings.is_loopback:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in self._hosts:
            raise ApiError(421, "this server answers on this machine only, under its own address")

    def _client(self, scope: Message, headers: dict[bytes, bytes]) -> bytes:
        """Who asks: a key's hash, or an address where no key is asked for."""
        if not self._keys:
            return str((scope.get("client") or ("unknown",))[0]).encode()
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = self._keys.digest(key.strip()) if scheme.lower() == b"bearer" else None
        if digest is None:
            raise ApiError(401, "an API key is needed: `Authorization: Bearer KEY`", param=None, code="invalid_api_key")
        return digest

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self._settings.body_bytes
        too_large = ApiError(413, f"the request body is larger than {most} bytes")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > most):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the request body did not arrive in time") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body at once, then what comes after it (the client leaving)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
