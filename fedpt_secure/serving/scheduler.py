"""From many requests to one engine: a thread that admits, steps and delivers, and the async side that waits.

All rows advance together, so that concurrent requests share each forward pass; a request joins at the next step and
leaves when it ends or its client does.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fedpt_secure.errors import FedptError
from fedpt_secure.serving.engine import Choice, Engine, Job


class Stopped(FedptError):
    """The server ended before the answer did."""


class EngineFailure(FedptError):
    """The engine failed in a way that no request explains."""


class Continuation:
    """One answer in progress: an async iterator of choices, ended by `max_new_tokens`, an end token or an error."""

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop, withdraw: Callable[[Continuation], None]) -> None:
        self.job = job
        self.loop = loop
        self._withdraw = withdraw
        self._arrived: asyncio.Queue[Choice | BaseException | None] = asyncio.Queue()
        self.produced = 0
        """Tokens computed so far; the engine's thread counts."""
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits any more: it leaves the queue at once, or the batch before the next step."""
        self._withdraw(self)

    async def __aiter__(self) -> AsyncIterator[Choice]:
        """Choices as they are made.

        Raises:
            FedptError: the engine could not go on.
        """
        while (item := await self._arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def deliver(self, item: Choice | BaseException | None) -> None:
        """From the loop's own thread."""
        self._arrived.put_nowait(item)


class Scheduler:
    """The one thread that computes.

    Guarantees: an answer depends on its job alone (the engine's rows are independent, and each job has its own seed);
    a cancelled continuation is computed for at most one more step; an error of the engine reaches everyone who waits
    for the step, and the server goes on.

    Args:
        engine: used by this thread only.
        batch_rows: rows that advance together; more continuations wait, first come first served.
        on_step: told the number of rows of each step.
        on_failure: told each error that is not a `FedptError`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_rows: int,
        on_step: Callable[[int], None] = lambda rows: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._batch_rows = batch_rows
        self._on_step = on_step
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._waiting: deque[Continuation] = deque()
        self._running: dict[int, Continuation] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fedpt-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; whoever still waits gets `Stopped`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> Continuation:
        """Queue a job; called on an event loop, where its choices will arrive.

        Raises:
            Stopped: the server is ending.
        """
        continuation = Continuation(job, asyncio.get_running_loop(), self._withdraw)
        with self._changed:
            if self._closing:
                raise Stopped("the server is stopping")
            self._waiting.append(continuation)
            self._changed.notify()
        return continuation

    def _withdraw(self, continuation: Continuation) -> None:
        with self._changed:
            continuation.cancelled = True
            with suppress(ValueError):  # it is not in the queue any more
                self._waiting.remove(continuation)

    @property
    def waiting(self) -> int:
        """Continuations that are queued."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Continuations that advance with every step."""
        return len(self._running)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing:
                    break
            self._drop_cancelled()
            self._admit()
            if self._running:
                self._step()
        left = [*self._running.values(), *self._waiting]
        for row in list(self._running):
            self._engine.drop(row)
        self._running.clear()
        self._waiting.clear()
        _deliver([(continuation, Stopped("the server is stopping")) for continuation in left])

    def _drop_cancelled(self) -> None:
        for row, continuation in list(self._running.items()):
            if continuation.cancelled:
                del self._running[row]
                self._engine.drop(row)

    def _admit(self) -> None:
        """Move waiting continuations into the batch: together, or one by one if that fails, so that the guilty one
        fails alone."""
        admitted: list[Continuation] = []
        with self._changed:
            while self._waiting and len(self._running) + len(admitted) < self._batch_rows:
                continuation = self._waiting.popleft()
                if not continuation.cancelled:
                    admitted.append(continuation)
        if not admitted:
            return
        try:
            rows = self._engine.admit([continuation.job for continuation in admitted])
            self._running.update(zip(rows, admitted, strict=True))
        except Exception:
            for continuation in admitted:
                try:
                    (row,) = self._engine.admit([continuation.job])
                    self._running[row] = continuation
                except Exception as error:
                    _deliver([(continuation, self._reportable(error))])

    def _step(self) -> None:
        self._on_step(len(self._running))
        try:
            choices = self._engine.step()
            items = [(row, self._running[row], choices[row]) for row in self._running]
        except Exception as error:
            failed = list(self._running.items())
            self._running.clear()
            for row, _ in failed:
                self._engine.drop(row)
            reported = self._reportable(error)
            _deliver([(continuation, reported) for _, continuation in failed])
            return
        deliveries: list[tuple[Continuation, Choice | BaseException | None]] = []
        for row, continuation, choice in items:
            continuation.produced += 1
            deliveries.append((continuation, choice))
            if choice.ends or continuation.produced == continuation.job.max_new_tokens:
                del self._running[row]
                self._engine.drop(row)
                deliveries.append((continuation, None))
        _deliver(deliveries)

    def _reportable(self, error: Exception) -> FedptError:
        if isinstance(error, FedptError):
            return error
        self._on_failure(error)
        return EngineFailure("the engine failed")


def _deliver(deliveries: list[tuple[Continuation, Choice | BaseException | None]]) -> None:
    """Hand over what one step produced: one wake-up per event loop, not one per token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Continuation, Choice | BaseException | None]]] = {}
    for continuation, item in deliveries:
        by_loop.setdefault(continuation.loop, []).append((continuation, item))
    for loop, items in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed, so that nobody is left who waits
            loop.call_soon_threadsafe(_put, items)


def _put(items: list[tuple[Continuation, Choice | BaseException | None]]) -> None:
    for continuation, item in items:
        continuation.deliver(item)
