"""How many requests a client may send, and how many answers are in work at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedpt_secure.serving.errors import ApiError

_BUCKETS_KEPT = 10_000
_BURST_SECONDS = 10.0


class RateLimit:
    """A token bucket per client: `per_minute` on average, a tenth of a minute's worth (at least 1) at once.

    Memory is bounded: of many clients, those that have been silent longest start afresh.

    Args:
        per_minute: requests per client.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_minute / 60
        self._burst = max(1.0, self._per_second * _BURST_SECONDS)
        self._clock = clock
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, client: bytes) -> None:
        """Count one request.

        Raises:
            ApiError: 429 with the time after which one more is accepted.
        """
        now = self._clock()
        level, since = self._buckets.pop(client, (self._burst, now))
        level = min(self._burst, level + (now - since) * self._per_second)
        allowed = level >= 1
        self._buckets[client] = (level - 1 if allowed else level, now)
        if len(self._buckets) > _BUCKETS_KEPT:
            self._buckets.popitem(last=False)
        if not allowed:
            raise ApiError(
                429,
                f"more than {self._per_second * 60:g} requests a minute; wait and try again",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=(1 - level) / self._per_second,
            )


class Admission:
    """Bounds the answers in work; used on the event loop only.

    Args:
        most: answers that are computed or wait at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.active = 0

    @contextmanager
    def of(self, answers: int) -> Iterator[None]:
        """Hold room for some answers.

        Raises:
            ApiError: 400 where they never fit, 429 where they do not fit now.
        """
        if answers > self._most:
            raise ApiError(400, f"{answers} answers at once are more than this server's {self._most}", param="n")
        if self.active + answers > self._most:
            raise ApiError(
                429,
                f"the server is busy with {self.active} answers; wait and try again",
                kind="rate_limit_error",
                code="server_busy",
                retry_after=1,
            )
        self.active += answers
        try:
            yield
        finally:
            self.active -= answers
