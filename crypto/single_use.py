"""What every client's state machine is, however the sum is made: one round, one call a phase, one thread, one copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from threading import RLock
from typing import NoReturn

from fedpt_secure.crypto.errors import ProtocolStateError


class ClientState(Enum):
    """What a client waits for."""

    READY = "ready: call advertise()"
    ADVERTISED = "advertised: call share_keys() with the key directory"
    SHARED = "shared: call mask() with the inbox and the vector"
    MASKED = "masked: call confirm() with the survivor list"
    CONFIRMED = "confirmed: call unmask() with the confirmations"
    FINISHED = "finished: the round is over"
    ABORTED = "aborted: the round is over"


class SingleUseClient(ABC):
    """The order of a client's calls. What the calls do is the subclass's, inside `with self._step(...)`.

    **Guarantees** A call out of its order, a second one, one from a second thread while another runs, and a copy are
    refused by `ProtocolStateError`. An exception of any kind within a step erases the secrets and ends the machine.
    """

    def __init__(self) -> None:
        self._turn = RLock()
        self._discarded = False
        self._state = ClientState.READY

    @property
    def state(self) -> ClientState:
        """Where the client stands."""
        return self._state

    def discard(self) -> None:
        """Wipe every secret and end the machine. Safe to call at any time, more than once.

        It waits for a call that another thread has running. Within such a call, as from a signal handler, it makes that
        call fail: what is computed from wiped secrets never leaves.
        """
        with self._turn:
            self._discarded = True
            self._erase()
            if self._state is not ClientState.FINISHED:
                self._state = ClientState.ABORTED

    @abstractmethod
    def _erase(self) -> None:
        """Overwrite or drop every secret."""

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise ProtocolStateError("a client is neither copied nor pickled: the copy could be shown another list or sum")

    @contextmanager
    def _step(self, expected: ClientState, following: ClientState) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise ProtocolStateError("another thread is using this client; it serves one at a time")
        try:
            self._require_state(expected)
            # Aborted until the step has run to its end: an exception of any kind leaves no state to go on from.
            self._state = ClientState.ABORTED
            try:
                yield
                if self._discarded:
                    raise ProtocolStateError("the client was discarded while this call ran; its answer is void")
            except BaseException:
                self.discard()
                raise
            self._state = following
        finally:
            self._turn.release()

    def _require_state(self, expected: ClientState) -> None:
        if self._state is not expected:
            raise ProtocolStateError(
                f"the client is {self._state.value!r}; this call needs {expected.value!r}",
                hint="a client serves one round, one call a phase; start another attempt with a new client",
            )
