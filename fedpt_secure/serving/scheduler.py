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

from fedpt_secure.errors import BlackBoxError, FedptError
from fedpt_secure.proxy import Request, TokenEvent
from fedpt_secure.serving.engine import Engine


class Stopped(FedptError):
    """The server ended before the answer did."""


class EngineFailure(FedptError):
    """The engine failed in a way that no request explains."""


class Continuation:
    """One answer in progress: an async iterator of its tokens' events, the last of which has an `ending`."""

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, withdraw: Callable[[Continuation], None]
    ) -> None:
        self.request = request
        self.loop = loop
        self._withdraw = withdraw
        self._arrived: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits any more: it leaves the queue at once, or the batch before the next step."""
        self._withdraw(self)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Events as they come.

        Raises:
            FedptError: the engine could not go on.
        """
        while (item := await self._arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def deliver(self, item: TokenEvent | BaseException | None) -> None:
        """From the loop's own thread."""
        self._arrived.put_nowait(item)


class Scheduler:
    """The one thread that computes.

    Guarantees: an answer depends on its request alone (the engine's rows are independent, and each request has its own
    seed); a cancelled continuation is computed for at most one more step; an error of the engine reaches everyone who
    is in the batch, and the server goes on.

    Args:
        engine: used by this thread only.
        batch_rows: rows that advance together; more continuations wait, first come first served.
        on_step: told the number of rows of each step.
        on_failure: told each error whose cause no client is told: the black box's, and what is no `FedptError`.
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

    def submit(self, request: Request) -> Continuation:
        """Queue a request; called on an event loop, where its events will arrive.

        Raises:
            Stopped: the server is ending.
        """
        continuation = Continuation(request, asyncio.get_running_loop(), self._withdraw)
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
        self._clear()
        self._waiting.clear()
        self._engine.close()
        _deliver([(continuation, Stopped("the server is stopping")) for continuation in left])

    def _drop_cancelled(self) -> None:
        for handle, continuation in list(self._running.items()):
            if continuation.cancelled:
                del self._running[handle]
                self._engine.remove(handle)

    def _clear(self) -> None:
        for handle in self._running:
            self._engine.remove(handle)
        self._running.clear()

    def _admit(self) -> None:
        """Move waiting continuations into the batch, as far as there is room."""
        admitted: list[Continuation] = []
        with self._changed:
            while self._waiting and len(self._running) + len(admitted) < self._batch_rows:
                admitted.append(self._waiting.popleft())
        for continuation in admitted:
            try:
                self._running[self._engine.add(continuation.request)] = continuation
            except Exception as error:
                _deliver([(continuation, self._reportable(error))])

    def _step(self) -> None:
        self._on_step(len(self._running))
        try:
            deliveries: list[tuple[Continuation, TokenEvent | BaseException | None]] = []
            for event in self._engine.step():
                continuation = self._running[event.handle]
                deliveries.append((continuation, event))
                if event.ending is not None:
                    del self._running[event.handle]
                    deliveries.append((continuation, None))
        except Exception as error:
            failed = list(self._running.values())
            self._clear()
            reported = self._reportable(error)
            deliveries = [(continuation, reported) for continuation in failed]
        _deliver(deliveries)

    def _reportable(self, error: Exception) -> FedptError:
        if isinstance(error, BlackBoxError):
            self._on_failure(error)
        if isinstance(error, FedptError):
            return error
        self._on_failure(error)
        return EngineFailure("the engine failed")


def _deliver(deliveries: list[tuple[Continuation, TokenEvent | BaseException | None]]) -> None:
    """Hand over what one step produced: one wake-up per event loop, not one per token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Continuation, TokenEvent | BaseException | None]]] = {}
    for continuation, item in deliveries:
        by_loop.setdefault(continuation.loop, []).append((continuation, item))
    for loop, items in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed, so that nobody is left who waits
            loop.call_soon_threadsafe(_put, items)


def _put(items: list[tuple[Continuation, TokenEvent | BaseException | None]]) -> None:
    for continuation, item in items:
        continuation.deliver(item)
