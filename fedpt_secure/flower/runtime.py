"""Flower's runtime API, by which whoever executes apps gets its tasks.

SuperLink and SuperNode run with `--isolation process`, where they start no program themselves, and with a secret,
without which anybody who reaches their port could take tasks away.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.supercore.runtime import RuntimeHttpClient

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """A task that was taken.

    Attributes:
        kind: Flower's name of its type.
        token: with which its input is had and its end is told. Secret.
    """

    kind: str
    token: str

    def __repr__(self) -> str:
        return f"Task(kind={self.kind!r})"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where a runtime API is.

    Attributes:
        address: `host:port`.
        authority: the certificate that its server's must be signed by; None for plain HTTP, which never leaves the
            machine.
    """

    address: str
    authority: Path | None = None

    def executor(self, secret: bytes, component: str) -> RuntimeHttpClient:
        """A client that takes tasks."""
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        signing = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        return self._client(component, signing)

    def of_task(self, task: Task, component: str) -> RuntimeHttpClient:
        """A client for one task."""
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        return self._client(component, RuntimeTokenHttpInterceptor(task.token))

    def certificates(self) -> bytes | None:
        """The authority's certificate, PEM."""
        return None if self.authority is None else self.authority.read_bytes()

    def _client(self, component: str, *interceptors: Any) -> RuntimeHttpClient:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        client: RuntimeHttpClient = RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.authority is None,
            root_certificates=self.certificates(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
        )
        return client


def acquire(executor: RuntimeHttpClient, kinds: Sequence[str]) -> Task | None:
    """Take the oldest task of one of these types, if there is one.

    Raises:
        httpx.HTTPError: the API does not answer, or refuses.
    """
    from flwr.proto.runtime_pb2 import AcquireTaskRequest

    answer = executor.AcquireTask(AcquireTaskRequest(supported_task_types=kinds))
    return Task(answer.task.type, answer.token) if answer.HasField("task") and answer.token else None


@contextmanager
def heartbeats(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the API that the task is alive, for the length of a `with` block; it gives up on it after a minute."""
    import httpx
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    over = threading.Event()

    def beat() -> None:
        while True:
            # One that is missed is made up for by the next; whether the task is lost shows when its end is told.
            with contextlib.suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            if over.wait(_HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
