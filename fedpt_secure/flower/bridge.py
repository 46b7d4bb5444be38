"""Between a client's SuperNode and its worker: takes the SuperNode's tasks, one by one, and runs the ClientApp.

A process of its own, so that neither Flower's libraries nor what a server sends come near the worker's memory, and a
lasting one, so that Flower is imported once and not once a message. It has no records, no keys and no model. The app
bundle that the server sent stays where the SuperNode put it: it is not unpacked, and nothing in it is run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedpt_secure.flower.client_app import make_client_app, silent_reply
from fedpt_secure.flower.compatibility import require_compatible
from fedpt_secure.flower.messages import LARGEST_MESSAGE
from fedpt_secure.flower.runtime import Runtime, Task, acquire, heartbeats
from fedpt_secure.network.local_socket import ask

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

_BUSY_SECONDS, _IDLE_SECONDS = 0.2, 1.0
_BUSY_FOR_SECONDS = 30.0
"""After a task the next one is looked for often: a round's phases follow each other."""
_PATIENCE_SECONDS = 120.0
_LONGEST_TTL_SECONDS = 7 * 24 * 3600.0
_COMPONENT = "flwr-clientapp"


def serve_tasks(runtime: Runtime, secret: bytes, app: ClientApp) -> None:
    """Take and run tasks for as long as the SuperNode is there.

    Raises:
        httpx.HTTPError: it has not answered for `_PATIENCE_SECONDS`, or a task's message could not be had or
            answered: then the SuperNode would wait for ever, and is to be restarted with this process.
    """
    import httpx
    from flwr.supercore.constant import TaskType

    executor = runtime.executor(secret, _COMPONENT)
    answered = time.monotonic()
    busy = 0.0
    while True:
        try:
            task = acquire(executor, list(TaskType))
            answered = time.monotonic()
        except httpx.HTTPError:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
            task = None
        if task is not None:
            run_task(runtime, task, app)
            busy = time.monotonic()
            continue
        time.sleep(_BUSY_SECONDS if time.monotonic() - busy < _BUSY_FOR_SECONDS else _IDLE_SECONDS)


def run_task(runtime: Runtime, task: Task, app: ClientApp) -> None:
    """Run the app on a task's message, whatever its bundle says, and end the task."""
    from flwr.common.constant import SubStatus
    from flwr.supercore.constant import TaskType
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    client = runtime.of_task(task, _COMPONENT)
    try:
        with heartbeats(client):
            message, context, _, _ = pull_task_input(client)
            try:
                reply = app(message, context) if task.kind == TaskType.CLIENT_APP else silent_reply(message, "task")
            except Exception as error:
                print(f"{message.metadata.message_type}: {type(error).__name__}", flush=True)  # noqa: T201
                reply = silent_reply(message, "app")
            push_message(client, reply, context)
            push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        client.close()


def main() -> None:
    """`python -m fedpt_secure.flower.bridge SOCKET RUNTIME_ADDRESS SECRET_FILE`."""
    socket, address, secret_file = sys.argv[1:]
    require_compatible()
    app = make_client_app(
        lambda request, seconds: ask(
            Path(socket), request, seconds=min(seconds, _LONGEST_TTL_SECONDS), largest=LARGEST_MESSAGE
        )
    )
    serve_tasks(Runtime(address), Path(secret_file).read_bytes(), app)


if __name__ == "__main__":
    main()
