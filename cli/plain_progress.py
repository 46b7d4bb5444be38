"""Progress as plain lines, for logs and pipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console

LASTING = 2.0
"""Seconds after which a task is worth a line: short tasks come by the dozen and stay silent."""
INTERVAL = 10.0
"""Seconds between two lines of a task, at least."""
_TICK = 0.5


class PlainProgress:
    """`fedpt_secure.progress.Progress` as lines: a task that lasts says so, then how far it is, then its end.

        rounds: 0/8, 2 s ...
        rounds: 1/8, 12 s, small LM held-out loss 5.312 ...
        rounds: 8/8, 131 s, small LM held-out loss 5.100

    Lines of unfinished tasks end in dots. Inside a `with` block a thread writes them, so that also a task that makes no
    progress is seen to last.

    Args:
        console: where the lines go.
        clock: seconds, never going back.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._tasks: list[_PlainTask] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._ticker = threading.Thread(target=self._keep_ticking, name="progress", daemon=True)

    def __enter__(self) -> PlainProgress:
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._ticker.join()

    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[_PlainTask]:
        task = _PlainTask(name, total, unit, began=self._clock())
        with self._lock:
            self._tasks.append(task)
        stopped = True
        try:
            yield task
            stopped = False
        finally:
            with self._lock:
                self._tasks.remove(task)
                now = self._clock()
                if now - task.began > LASTING:
                    self._print(task.line(now) + (", stopped" if stopped else ""))

    def note(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def tick(self) -> None:
        """Write the lines that are due."""
        with self._lock:
            now = self._clock()
            for task in self._tasks:
                if now >= task.next_line:
                    task.next_line = now + INTERVAL
                    self._print(f"{task.line(now)} ...")

    def _keep_ticking(self) -> None:
        while not self._stopped.wait(_TICK):
            self.tick()

    def _print(self, line: str) -> None:
        self._console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


class _PlainTask:
    def __init__(self, name: str, total: float | None, unit: str, *, began: float) -> None:
        self._name = name
        self._total = total
        self._unit = unit
        self._done = 0.0
        self._text = ""
        self.began = began
        self.next_line = began + LASTING

    def advance(self, amount: float = 1) -> None:
        self._done += amount

    def describe(self, text: str) -> None:
        self._text = text

    def line(self, now: float) -> str:
        parts = [self._amount(), f"{now - self.began:.0f} s", self._text]
        return f"{self._name}: {', '.join(part for part in parts if part)}"

    def _amount(self) -> str:
        """Done of total with its unit, bytes as megabytes; nothing where neither is known."""
        scale, digits, unit = (1e6, 1, "MB") if self._unit == "B" else (1, 0, self._unit)
        if self._total is None and not self._done:
            return ""
        amounts = (self._done,) if self._total is None else (self._done, self._total)
        numbers = "/".join(f"{amount / scale:.{digits}f}" for amount in amounts)
        return numbers if unit in ("", self._name) else f"{numbers} {unit}"
