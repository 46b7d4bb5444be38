"""Listening, and stopping in order."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fedpt_secure.errors import ConfigError
from fedpt_secure.serving.settings import ServeSettings

_BACKLOG = 256
_MOST_CONNECTIONS = 4096


class Listener:
    """A socket that is open, and the address under which it can be reached.

    Args:
        settings: host, port and certificate.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, settings: ServeSettings) -> None:
        host = settings.host
        try:
            family = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0][0]
            self.socket = socket.create_server((host, settings.port), family=family, backlog=_BACKLOG)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {host} port {settings.port}: {reason}", hint="--port 0 takes a free one"
            ) from None
        scheme = "https" if settings.tls_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{shown}:{self.socket.getsockname()[1]}"


class HttpServer:
    """uvicorn around an application and an open socket.

    Args:
        app: from `create_app`.
        listener: its socket is closed at the end.
        settings: how long a shutdown may take, certificates.
        on_ready: called once requests are answered.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """

    def __init__(
        self, app: Any, listener: Listener, settings: ServeSettings, *, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        self._listener = listener
        self._server = _Server(_configured(app, settings), on_ready)

    def run(self) -> None:
        """Answer requests until `stop`, or a signal where this is the main thread."""
        asyncio.run(self._server.serve(sockets=[self._listener.socket]))

    def stop(self) -> None:
        """Begin to stop, from any thread."""
        self._server.should_exit = True


def serve(
    app: Any, listener: Listener, settings: ServeSettings, *, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; for the main thread. Arguments and errors are `HttpServer`'s.

    Guarantees: after the signal no request is accepted; those that run have `shutdown_seconds` to end, then they are
    cancelled; then this returns.
    """
    server = HttpServer(app, listener, settings, on_ready=on_ready)
    with _signals_only_stop():
        server.run()


def _configured(app: Any, settings: ServeSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        access_log=False,  # it would log paths and queries as they were sent
        log_config=None,
        ws="none",
        proxy_headers=False,
        server_header=False,
        date_header=True,
        lifespan="on",
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ssl_certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"the TLS certificate or its key cannot be used: {error}", hint="both as PEM files") from None
    return config


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()


@contextmanager
def _signals_only_stop() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again when it has ended; a clean stop is not a death by signal."""
    stopping = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: None) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
