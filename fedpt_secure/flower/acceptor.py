"""Takes the SuperLink's tasks on the server's machine, one at a time, and starts the ServerApp that is installed there.

It also lets the SuperNodes in whose public keys lie in the folder, new ones within seconds. A run that was going on
when the server was killed goes on: as another of Flower's runs, with the run directory and the journal that are there.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import FedptError, IdentityError, RoundError
from fedpt_secure.flower.certificates import read_node_key
from fedpt_secure.flower.compatibility import require_compatible
from fedpt_secure.flower.control import Control, connected, shell_bundle
from fedpt_secure.flower.processes import child_environment, start_tethered
from fedpt_secure.flower.runtime import Runtime, Task, acquire
from fedpt_secure.flower.server_task import COMPONENT
from fedpt_secure.network.folder import ServerFolder

READY = "ready.json"
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 3.0
_PATIENCE_SECONDS = 60.0
_MOST_RESTARTS = 3
"""Of a ServerApp that was killed, in the life of this process."""


class Acceptor:
    """See the module."""

    def __init__(self, folder: ServerFolder, runtime: Runtime, secret: bytes) -> None:
        self._folder, self._runtime = folder, runtime
        self._executor = runtime.executor(secret, COMPONENT)
        self._keys: frozenset[bytes] = frozenset()
        self._running: tuple[Task, subprocess.Popen[bytes]] | None = None
        self._restarts = 0
        self._first = True

    def work(self) -> None:
        """Work for as long as the SuperLink is there.

        Raises:
            httpx.HTTPError: it has not answered for a minute.
        """
        import httpx

        answered, looked = time.monotonic(), -_LOOK_SECONDS
        while True:
            try:
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self.admit()
                self.step()
                answered = time.monotonic()
            except (httpx.HTTPError, RoundError):
                if time.monotonic() - answered > _PATIENCE_SECONDS:
                    raise
            time.sleep(_POLL_SECONDS)

    def admit(self) -> None:
        """Register the SuperNodes of the folder that are not registered yet; name files that are no keys."""
        keys = set()
        for path in sorted(self._folder.nodes.glob("*.pub")):
            try:
                keys.add(read_node_key(path.read_bytes()))
            except (IdentityError, OSError) as error:
                _say(f"{path.name}: {error}")
        if self._keys == keys and (self._folder.flower / READY).exists():
            return
        with connected(self._runtime) as control:
            if self._first:
                self._go_on(control)
                self._first = False
            new = control.register(keys)
        self._keys = frozenset(keys)
        _say(f"{len(keys)} SuperNodes may connect, {new} of them new")
        files.write_json(self._folder.flower / READY, {"nodes": len(keys)}, mode=0o600)

    def step(self) -> None:
        """Look after the task that runs, or take one."""
        from flwr.supercore.constant import TaskType

        if self._running is not None:
            task, process = self._running
            if (code := process.poll()) is None:
                return
            self._running = None
            _say(f"the ServerApp ended with {code}")
            if code:
                self._tell_end(task, code)
            if code < 0 and self._restarts < _MOST_RESTARTS:
                self._restarts += 1
                with connected(self._runtime) as control:
                    control.start(self._bundle())
        task_taken = acquire(self._executor, [TaskType.SERVER_APP])
        if task_taken is not None:
            self._running = task_taken, self._start(task_taken)

    def _go_on(self, control: Control) -> None:
        """End runs whose ServerApp died with this process's predecessor; where there was one, start it again."""
        dead = [run.run_id for run in control.unfinished() if not run.pending]
        for run_id in dead:
            control.stop(run_id)
        if dead:
            _say("going on with the run that was interrupted")
            control.start(self._bundle())

    def _bundle(self) -> bytes:
        return shell_bundle(self._folder.flower / "app")

    def _start(self, task: Task) -> subprocess.Popen[bytes]:
        _say("starting the ServerApp")
        arguments = [str(self._folder.path), self._runtime.address]
        if self._runtime.authority is not None:
            arguments.append(str(self._runtime.authority))
        return start_tethered(
            [sys.executable, "-P", "-m", "fedpt_secure.flower.server_task", *arguments],
            environment=child_environment(self._folder.flower),
            directory=self._folder.flower,
            log=sys.stdout.fileno(),
            secret=task.token.encode(),
        )

    def _tell_end(self, task: Task, code: int) -> None:
        """Say that a task has failed that could not say so itself; said twice, it counts once."""
        import httpx
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        client = self._runtime.of_task(task, COMPONENT)
        with contextlib.closing(client), contextlib.suppress(httpx.HTTPError):
            client.PushTaskOutput(
                PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=f"the ServerApp ended with {code}")
            )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the process's standard output is its log


def main() -> None:
    """`python -m fedpt_secure.flower.acceptor FOLDER RUNTIME_ADDRESS SECRET_FILE [AUTHORITY]`."""
    folder, address, secret_file, *authority = sys.argv[1:]
    runtime = Runtime(address, Path(authority[0]) if authority else None)
    try:
        require_compatible()
        Acceptor(ServerFolder(Path(folder)), runtime, Path(secret_file).read_bytes()).work()
    except FedptError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
