"""One run of the ServerApp, in a process of its own that the acceptor starts and that dies with it.

Its token comes on standard input. How it ended goes to the SuperLink and, with the exit code that `federation run`
ends with, to `outcome.json`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import FedptError
from fedpt_secure.flower.runtime import Runtime, Task, heartbeats
from fedpt_secure.flower.server_app import make_server_app
from fedpt_secure.network.folder import ServerFolder

COMPONENT = "flwr-serverapp"
OUTCOME = "outcome.json"
_EXIT_FILES, _EXIT_UNEXPECTED = 10, 1


class Lines:
    """`fedpt_secure.progress.Progress` as lines of the process's log."""

    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[Lines]:
        """Say that it began; its advance is in `status.json`."""
        self.note(name)
        yield self

    def note(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)  # noqa: T201 - the process's standard output is its log

    def advance(self, amount: float = 1) -> None:
        """Nothing: a log has no bar."""

    def describe(self, text: str) -> None:
        """Nothing: a log has no bar."""


def run_task(folder: ServerFolder, runtime: Runtime, task: Task) -> int:
    """Run the app on a task, tell its end, and return its exit code."""
    from flwr.common.constant import SubStatus
    from flwr.common.serde import context_from_proto, run_from_proto
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    beats = runtime.of_task(task, COMPONENT)
    grid = HttpGrid(
        runtime_api_address=runtime.address,
        insecure=runtime.authority is None,
        root_certificates=runtime.certificates(),
        token=task.token,
    )
    with contextlib.closing(beats), contextlib.closing(grid), heartbeats(beats):
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        code, message, hint = 0, "", ""
        try:
            make_server_app(folder, Lines())(grid=grid, context=context_from_proto(given.context))
        except FedptError as error:
            code, message, hint = error.exit_code, error.message, error.hint
        except OSError as error:
            code, message = _EXIT_FILES, f"cannot write or read {error.filename or ''}: {error.strerror or error}"
        except Exception as error:
            code, message = _EXIT_UNEXPECTED, f"{type(error).__name__}: {error}"
            sys.excepthook(type(error), error, error.__traceback__)
        if code:
            Lines().note(f"error: {message}")
        files.write_json(
            folder.flower / OUTCOME,
            {"run_id": str(given.run.run_id), "exit_code": code, "message": message, "hint": hint},
            mode=0o600,
        )
        beats.PushTaskOutput(
            PushTaskOutputRequest(sub_status=SubStatus.FAILED if code else SubStatus.COMPLETED, details=message)
        )
    return code


def main() -> None:
    """`python -m fedpt_secure.flower.server_task FOLDER RUNTIME_ADDRESS [AUTHORITY]`, the token on standard input."""
    from flwr.supercore.constant import TaskType

    folder, address, *authority = sys.argv[1:]
    runtime = Runtime(address, Path(authority[0]) if authority else None)
    sys.exit(run_task(ServerFolder(Path(folder)), runtime, Task(TaskType.SERVER_APP, sys.stdin.read())))


if __name__ == "__main__":
    main()
