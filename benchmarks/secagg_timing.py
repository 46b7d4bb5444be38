"""Clocks and checks that all parts of the benchmark share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fedpt_secure.crypto import RingVector

_clock = time.perf_counter


def count_cpu_time() -> None:
    """From here on, in this process, count processor time of all threads instead of wall time.

    On a machine that others use at the same time it is the steadier of the two, and means the same on one thread.
    """
    global _clock
    _clock = time.process_time


class WrongSum(RuntimeError):
    """A measured aggregation gave another sum than the plain one: its times mean nothing."""


def check_sum(total: RingVector, expected: RingVector, what: str) -> None:
    """Accept a sum that is right in every coordinate.

    Raises:
        WrongSum: it is not.
    """
    if total.dtype != expected.dtype or total.shape != expected.shape or (total != expected).any():
        raise WrongSum(f"{what}: the aggregate is not the sum of the survivors' vectors")


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that one call takes, and what it returns."""
    start = _clock()
    result = work(*arguments)
    return _clock() - start, result


def interleaved(works: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Best seconds of each of `works`, called in turn `rounds` times.

    In turn, so that a slow spell of a shared machine hits all of them; the best, since noise only ever adds time.
    """
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for position, work in enumerate(works):
            best[position] = min(best[position], timed(work)[0])
    return best
