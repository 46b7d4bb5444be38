"""Between a client's SuperNode and its worker: takes the SuperNode's tasks, one by one, and runs the ClientApp.

A process of its own, so that neither Flower's libraries nor what a server sends come near the worker's memory, and a
lasting one, so that Flower is imported once and not once a message. It has no records, no keys and no model. The app
bundle that the server sent stays where the SuperNode put it: it is not unpacked, and nothing in it is run.

A SuperNode handles one message after the other, and waits for the reply without end. It can also leave a task behind
whose message it has given up on, when its run ends at a bad moment: a reply to that would be sent in the next one's
place. So such a task, known by the newer one beside it, ends without a reply; and where it is not clear what the
SuperNode waits for, this process ends, and both are started again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedpt_secure.errors import RoundError
from fedpt_secure.flower.arriving import Arriving
from fedpt_secure.flower.client_app import make_client_app, silent_reply
from fedpt_secure.flower.compatibility import require_compatible
from fedpt_secure.flower.messages import LARGEST_MESSAGE
from fedpt_secure.flower.runtime import Runtime, Task, acquire, heartbeats
from fedpt_secure.network.local_socket import ask

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.supercore.runtime import RuntimeHttpClient

_BUSY_SECONDS, _IDLE_SECONDS = 0.2, 1.0
_BUSY_FOR_SECONDS = 30.0
"""After a task the next one is looked for often: a round's phases follow each other."""
_PATIENCE_SECONDS = 120.0
_LONGEST_TTL_SECONDS = 7 * 24 * 3600.0
_COMPONENT = "flwr-clientapp"


def serve_tasks(runtime: Runtime, secret: bytes, app: ClientApp) -> None:
    """Take and run tasks for as long as the SuperNode is there.

    Raises:
        httpx.HTTPError, RoundError: it has not answered for `_PATIENCE_SECONDS`, or a task's message could not be had
            or answered: then the SuperNode could wait for ever, and is to be restarted with this process.
    """
    import httpx
    from flwr.supercore.constant import TaskType

    executor = runtime.executor(secret, _COMPONENT)
    answered = time.monotonic()
    busy = 0.0
    task: Task | None = None
    while True:
        try:
            task = task or acquire(executor, list(TaskType))
            answered = time.monotonic()
        except httpx.HTTPError:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
        if task is not None:
            task = run_task(runtime, task, app, newer=lambda: acquire(executor, list(TaskType)))
            busy = time.monotonic()
            continue
        time.sleep(_BUSY_SECONDS if time.monotonic() - busy < _BUSY_FOR_SECONDS else _IDLE_SECONDS)


def run_task(runtime: Runtime, task: Task, app: ClientApp, *, newer: Callable[[], Task | None]) -> Task | None:
    """Run the app on a task's message, whatever its bundle says, and end the task.

    Args:
        newer: takes the next task, if there is one. It is asked while the message is not there yet.

    Returns the newer task, if there is one in whose favour the SuperNode has given up on this one.

    Raises:
        RoundError: the message is gone or cannot be decoded, and the SuperNode may wait for its reply.
        httpx.HTTPError: the SuperNode does not answer.
    """
    from flwr.common.constant import SubStatus
    from flwr.supercore.constant import TaskType
    from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

    client = runtime.of_task(task, _COMPONENT)
    try:
        with heartbeats(client):
            arriving, context = _input(client)
            while not arriving.fetch():
                following = newer()
                if following is not None:
                    push_task_output(client, None, SubStatus.FAILED, "")
                    return following
                time.sleep(_BUSY_SECONDS)
            message = arriving.message()
            try:
                reply = app(message, context) if task.kind == TaskType.CLIENT_APP else silent_reply(message, "task")
            except Exception as error:
                print(f"{message.metadata.message_type}: {type(error).__name__}", flush=True)  # noqa: T201
                reply = silent_reply(message, "app")
            push_message(client, reply, context)
            push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        client.close()
    return None


def _input(client: RuntimeHttpClient) -> tuple[Arriving, Context]:
    """A task's message and context. Its bundle is dropped."""
    from flwr.common.serde import context_from_proto
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest
    from flwr.supercore.task_identity import TaskIdentity

    given = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    context = context_from_proto(given.context)
    pulled = client.PullMessages(PullAppMessagesRequest())
    if not pulled.messages_list:
        raise RoundError("a task without a message")
    node = Node(node_id=context.node_id)
    return Arriving(client, pulled.message_object_trees[0], node=node, run_id=context.run_id), context


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
