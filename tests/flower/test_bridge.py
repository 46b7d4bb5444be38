"""A client's tasks: each gets one reply, none runs what was sent, and one that was given up on holds up no other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import context_to_proto
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedpt_secure.errors import RoundError
from fedpt_secure.flower import bridge
from fedpt_secure.flower.client_app import make_client_app
from fedpt_secure.flower.messages import REPLY, REQUEST, pack, unpack
from fedpt_secure.flower.runtime import Task
from fedpt_secure.network.transport import Reply, Request

pytestmark = pytest.mark.usefixtures("task_identity")


class Bundle:
    """An app bundle that nobody may look into."""

    def __getattr__(self, name):
        raise AssertionError(f"the bundle's {name} was looked at")


class Node:
    """A SuperNode's runtime API with one task."""

    def __init__(self, monkeypatch, content=None):
        content = content or pack(REQUEST, Request("hello", b"who").to_bytes())
        message = Message(content, dst_node_id=1, message_type="query.hello", ttl=30.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.message, self.tree = message, get_object_tree(message)
        self.objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        self.announced = set(self.objects)
        self.replies, self.ends, self.closed = [], [], False
        runner = "flwr.supernode.runtime.run_clientapp"
        monkeypatch.setattr(f"{runner}.push_message", lambda client, reply, context: self.replies.append(reply))
        monkeypatch.setattr(
            f"{runner}.push_task_output", lambda client, context, status, details: self.ends.append((status, details))
        )
        monkeypatch.setattr(bridge, "_BUSY_SECONDS", 0.01)

    def of_task(self, task, component):
        return self

    def PullTaskInput(self, request):
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        return SimpleNamespace(
            task_id=1, run=SimpleNamespace(run_id=1), context=context_to_proto(context), fab=Bundle()
        )

    def PullMessages(self, request):
        return SimpleNamespace(messages_list=[object()], message_object_trees=[self.tree])

    def PullObject(self, request):
        name = request.object_id
        return SimpleNamespace(
            object_found=name in self.announced,
            object_available=name in self.objects,
            object_content=self.objects.get(name, b""),
        )

    def ConfirmMessageReceived(self, request):
        pass

    def SendTaskHeartbeat(self, request):
        pass

    def close(self):
        self.closed = True


def run(node, app=None, *, kind=TaskType.CLIENT_APP, newer=lambda: None):
    app = app or make_client_app(lambda request, seconds: Reply("answer", b"me").to_bytes())
    return bridge.run_task(node, Task(kind, "token"), app, newer=newer)


def reply_of(node):
    (message,) = node.replies
    return Reply.from_bytes(unpack(message.content, REPLY))


def test_a_task_is_answered_once_and_ended(monkeypatch):
    node = Node(monkeypatch)
    assert run(node) is None
    assert reply_of(node) == Reply("answer", b"me")
    assert node.replies[0].metadata.reply_to_message_id == node.message.metadata.message_id
    assert [status for status, _ in node.ends] == ["completed"]
    assert node.closed


def test_an_app_that_fails_is_one_word_and_the_task_ends(monkeypatch, capsys):
    node = Node(monkeypatch)

    def app(message, context):
        raise ValueError("a sentence with somebody's text")

    run(node, app)
    assert reply_of(node) == Reply("silent", code="app")
    assert len(node.ends) == 1
    assert "somebody" not in capsys.readouterr().out + str(node.ends)


@pytest.mark.parametrize("kind", [kind for kind in TaskType if kind != TaskType.CLIENT_APP])
def test_a_task_of_another_kind_reaches_no_app(monkeypatch, kind):
    node = Node(monkeypatch)
    run(node, lambda message, context: pytest.fail("was run"), kind=kind)
    assert reply_of(node) == Reply("silent", code="task")


def test_a_message_on_its_way_is_waited_for(monkeypatch):
    node = Node(monkeypatch)
    arriving, node.objects = list(node.objects.items()), {}

    def newer():
        if arriving:
            node.objects.update([arriving.pop()])

    assert run(node, newer=newer) is None
    assert reply_of(node).kind == "answer"


def test_a_task_that_its_node_gave_up_on_ends_without_a_reply_and_the_newer_one_is_next(monkeypatch):
    """A reply to it would be sent in the newer one's place, and so would every later one."""
    node = Node(monkeypatch)
    node.objects = {}
    following = Task(TaskType.CLIENT_APP, "another")
    assert run(node, newer=lambda: following) is following
    assert node.replies == []
    assert [status for status, _ in node.ends] == ["failed"]


def test_a_message_that_is_gone_ends_the_bridge_and_with_it_the_node(monkeypatch):
    node = Node(monkeypatch)
    node.objects, node.announced = {}, set()
    with pytest.raises(RoundError, match="gone"):
        run(node)
    assert (node.replies, node.ends, node.closed) == ([], [], True)


def test_a_tasks_token_is_in_no_representation():
    assert "token-1" not in repr(Task(TaskType.CLIENT_APP, "token-1"))
