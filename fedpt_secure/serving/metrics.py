"""Counters for Prometheus. Labels are from fixed sets: no text, key, address or unknown name ever becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROUTES = (
    "/",
    "/page.css",
    "/page.js",
    "/healthz",
    "/metrics",
    "/v1/models",
    "/v1/privacy",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/compare",
)
OTHER = "other"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


def route_of(path: str) -> str:
    """A path as a label."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ROUTES else OTHER


class Metrics:
    """One server's figures, in a registry of their own.

    Args:
        running: answers that advance with every step, asked when scraped.
        waiting: answers in the queue.
    """

    def __init__(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "fedpt", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **named)
        self.request_seconds = Histogram(
            "request_seconds", "Time to the last byte.", ("route",), buckets=_SECONDS, **named
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "Time from the request to its first text.", buckets=_SECONDS, **named
        )
        self.tokens = Counter("tokens", "Tokens read (prompt) and computed (completion).", ("kind", "arm"), **named)
        self.step_rows = Histogram(
            "step_rows", "Answers that one step advanced.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **named
        )
        self.cancelled = Counter("cancelled", "Requests whose client left before the end.", **named)
        self.failures = Counter("failures", "Errors that no rule foresaw.", **named)
        Gauge("answers_running", "Answers that advance with every step.", **named).set_function(running)
        Gauge("answers_waiting", "Answers that wait for a place.", **named).set_function(waiting)

    def exposition(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
