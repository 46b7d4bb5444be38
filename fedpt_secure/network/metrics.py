"""Prometheus metrics of a server, on 127.0.0.1 only: counts, sizes and times, no client's name."""

from __future__ import annotations

from typing import Any

from fedpt_secure.errors import ConfigError

_PREFIX = "fedpt_secure_federation"


class Metrics:
    """Counts what an observer tells it; this one nothing, where no port is set."""

    @staticmethod
    def on(port: int | None) -> Metrics:
        """Metrics that are served at a port, or that are not kept.

        Raises:
            ConfigError: the package is missing, or the port is taken.
        """
        return Metrics() if port is None else _Served(port)

    def reachable(self, clients: int) -> None:
        """So many clients can be reached."""

    def client(self, phase: str, outcome: str, size: int) -> None:
        """A client's outcome in a phase, and its bytes."""

    def phase(self, phase: str, seconds: float) -> None:
        """A phase's length."""

    def round(self, *, aborted: bool, survivors: int) -> None:
        """A round's end."""


class _Served(Metrics):
    def __init__(self, port: int) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise ConfigError(
                "metrics_port needs the package prometheus-client", hint='pip install "fedpt-secure[flower]"'
            ) from None
        registry: Any = prometheus.CollectorRegistry()
        kept = {"registry": registry}
        self._reachable = prometheus.Gauge(f"{_PREFIX}_reachable_clients", "Clients that can be reached", **kept)
        self._clients = prometheus.Counter(
            f"{_PREFIX}_client_outcomes", "Clients by phase and outcome", ["phase", "outcome"], **kept
        )
        self._bytes = prometheus.Counter(f"{_PREFIX}_received_bytes", "Bytes from clients", ["phase"], **kept)
        self._phases = prometheus.Histogram(
            f"{_PREFIX}_phase_seconds", "Length of phases", ["phase"], buckets=(0.1, 1, 5, 15, 60, 300, 900), **kept
        )
        self._rounds = prometheus.Counter(f"{_PREFIX}_rounds", "Rounds by outcome", ["outcome"], **kept)
        self._survivors = prometheus.Gauge(f"{_PREFIX}_survivors", "Survivors of the last round", **kept)
        try:
            prometheus.start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise ConfigError(f"metrics_port {port} cannot be used: {error.strerror or error}") from None

    def reachable(self, clients: int) -> None:
        self._reachable.set(clients)

    def client(self, phase: str, outcome: str, size: int) -> None:
        self._clients.labels(phase, outcome).inc()
        self._bytes.labels(phase).inc(size)

    def phase(self, phase: str, seconds: float) -> None:
        self._phases.labels(phase).observe(seconds)

    def round(self, *, aborted: bool, survivors: int) -> None:
        self._rounds.labels("aborted" if aborted else "completed").inc()
        self._survivors.set(survivors)
