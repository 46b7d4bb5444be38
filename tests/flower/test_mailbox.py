"""Flower's grid as a mailbox: replies in pieces, in another's name, without end, of the wrong form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedpt_secure.flower import arriving
from fedpt_secure.flower.grid_transport import Delivery
from fedpt_secure.flower.mailbox import FlowerMailbox
from fedpt_secure.flower.messages import REPLY, pack

pytestmark = pytest.mark.usefixtures("task_identity")
NODE, OTHER = 11, 22


class Link:
    """The runtime API of a SuperLink, and the grid on it."""

    def __init__(self):
        self.node = Node(node_id=SUPERLINK_NODE_ID)
        self.run = SimpleNamespace(run_id=1)
        self.sent = {}
        self.filed = []
        self.objects = {}
        self.announced = set()
        self.confirmed = []
        self._runtime_client = self

    def get_node_ids(self):
        return [NODE, OTHER]

    def push_messages(self, messages):
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.sent[message.metadata.dst_node_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def file(self, reply, *, to, sender, arrived=True):
        """A reply that the SuperLink has filed under message `to` as from `sender`, whatever stands in it."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        proto = message_to_proto(remove_content_from_message(reply))
        proto.metadata.reply_to_message_id, proto.metadata.src_node_id = to, sender
        self.filed.append((proto, get_object_tree(reply)))
        objects = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        self.announced |= set(objects)
        if arrived:
            self.objects |= objects
        return objects

    def PullMessages(self, request):
        found = [(p, t) for p, t in self.filed if p.metadata.reply_to_message_id in request.message_ids]
        self.filed = [entry for entry in self.filed if entry not in found]
        return SimpleNamespace(
            messages_list=[proto for proto, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request):
        there = request.object_id in self.objects
        return SimpleNamespace(
            object_found=request.object_id in self.announced,
            object_available=there,
            object_content=self.objects.get(request.object_id, b""),
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def mailbox(link):
    return FlowerMailbox(link)


def message_to(mailbox, node=NODE):
    (message,) = mailbox.send("query.hello", {node: b"who"}, ttl=30.0)
    return message


def reply(link, content, node=NODE):
    return Message(content, reply_to=link.sent[node])


def test_a_reply_comes_with_its_bytes(link, mailbox):
    message = message_to(mailbox)
    assert mailbox.collect([message]) == []
    link.file(reply(link, pack(REPLY, b"\x00bytes")), to=message, sender=NODE)
    assert mailbox.collect([message]) == [Delivery(message, NODE, b"\x00bytes")]
    assert len(link.confirmed) == 1
    assert mailbox.collect([message]) == []


def test_each_node_gets_its_own_bytes(link, mailbox):
    sent = mailbox.send("train.mask", {NODE: b"one", OTHER: b"two"}, ttl=30.0)
    assert sorted(sent.values()) == [NODE, OTHER]
    for node, body in ((NODE, b"one"), (OTHER, b"two")):
        assert link.sent[node].content["fedpt"]["request"] == body
        assert (link.sent[node].metadata.message_type, link.sent[node].metadata.ttl) == ("train.mask", 30.0)


def test_a_node_that_nothing_could_be_sent_to_is_left_out(link, mailbox, monkeypatch):
    pushed = Link.push_messages
    monkeypatch.setattr(link, "push_messages", lambda messages: [pushed(link, messages)[0], ""])
    assert list(mailbox.send("train.mask", {NODE: b"one", OTHER: b"two"}, ttl=30.0).values()) == [NODE]


def test_a_reply_whose_content_is_on_its_way_holds_nobody_up(link, mailbox):
    first, second = message_to(mailbox), message_to(mailbox, OTHER)
    objects = link.file(reply(link, pack(REPLY, b"slow")), to=first, sender=NODE, arrived=False)
    link.file(reply(link, pack(REPLY, b"quick"), OTHER), to=second, sender=OTHER)
    assert mailbox.collect([first, second]) == [Delivery(second, OTHER, b"quick")]
    for name, content in objects.items():
        assert mailbox.collect([first]) == []
        link.objects[name] = content
    assert mailbox.collect([first]) == [Delivery(first, NODE, b"slow")]


def test_whose_a_reply_is_says_the_link_and_not_the_reply(link, mailbox):
    """The content of a reply is its sender's to write, its claim to answer somebody else's message included."""
    first, second = message_to(mailbox), message_to(mailbox, OTHER)
    claims_to_be_others = reply(link, pack(REPLY, b"forged"), OTHER)
    assert claims_to_be_others.metadata.reply_to_message_id == second
    link.file(claims_to_be_others, to=first, sender=NODE)
    assert mailbox.collect([first, second]) == [Delivery(first, NODE, b"forged")]


def test_a_reply_from_another_node_than_the_one_asked_is_marked_as_that_ones(link, mailbox):
    message = message_to(mailbox)
    link.file(reply(link, pack(REPLY, b"x")), to=message, sender=OTHER)
    assert mailbox.collect([message]) == [Delivery(message, OTHER, None)]


def test_errors_are_told_with_whose_they_are(link, mailbox):
    first, second = message_to(mailbox), message_to(mailbox, OTHER)
    link.file(Message(Error(1, "a reason that nobody reads"), reply_to=link.sent[NODE]), to=first, sender=NODE)
    link.file(Message(Error(2, "gone"), reply_to=link.sent[OTHER]), to=second, sender=SUPERLINK_NODE_ID)
    assert mailbox.collect([first, second]) == [Delivery(first, NODE, None), Delivery(second, None, None)]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"fedpt": ConfigRecord({"reply": "text"})}),
        RecordDict({"fedpt": ConfigRecord({"reply": b"", "more": 1})}),
        RecordDict({"other": ConfigRecord({"reply": b""})}),
    ],
    ids=["nothing", "text", "more", "name"],
)
def test_a_reply_of_another_form_is_no_reply(link, mailbox, content):
    message = message_to(mailbox)
    link.file(reply(link, content), to=message, sender=NODE)
    assert mailbox.collect([message]) == [Delivery(message, NODE, None)]


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"Message  5\x00{}", b"NoSuchClass  0\x00"])
def test_an_object_that_cannot_be_decoded_costs_its_sender_only(link, mailbox, damage):
    first, second = message_to(mailbox), message_to(mailbox, OTHER)
    for name in link.file(reply(link, pack(REPLY, b"x")), to=first, sender=NODE):
        link.objects[name] = damage or b"\xff"
    link.file(reply(link, pack(REPLY, b"good"), OTHER), to=second, sender=OTHER)
    assert sorted(mailbox.collect([first, second]), key=lambda delivery: delivery.node) == [
        Delivery(first, NODE, None),
        Delivery(second, OTHER, b"good"),
    ]


def test_content_that_will_not_come_is_no_reply(link, mailbox):
    message = message_to(mailbox)
    for name in link.file(reply(link, pack(REPLY, b"x")), to=message, sender=NODE, arrived=False):
        link.announced.discard(name)
    assert mailbox.collect([message]) == [Delivery(message, NODE, None)]


def test_a_reply_without_end_is_cut(link, mailbox, monkeypatch):
    monkeypatch.setattr(arriving, "LARGEST_MESSAGE", 1000)
    first, second = message_to(mailbox), message_to(mailbox, OTHER)
    link.file(reply(link, pack(REPLY, bytes(2000))), to=first, sender=NODE)
    many = RecordDict({f"{index}": ConfigRecord({"reply": b""}) for index in range(20)})
    many = RecordDict({name: ConfigRecord({"reply": name.encode()}) for name in many})
    link.file(reply(link, many, OTHER), to=second, sender=OTHER)
    assert mailbox.collect([first, second]) == [Delivery(first, NODE, None), Delivery(second, OTHER, None)]


def test_what_is_forgotten_does_not_come(link, mailbox):
    message = message_to(mailbox)
    link.file(reply(link, pack(REPLY, b"late")), to=message, sender=NODE)
    mailbox.forget([message])
    assert mailbox.collect([message]) == []
