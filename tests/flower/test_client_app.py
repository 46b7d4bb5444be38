"""The ClientApp forwards bytes and has no opinion."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr")
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedpt_secure.errors import RoundError
from fedpt_secure.federation.transcript import PHASES
from fedpt_secure.flower.client_app import make_client_app
from fedpt_secure.flower.messages import MESSAGE_TYPES, REPLY, REQUEST, pack, unpack
from fedpt_secure.network.transport import Reply, Request

pytestmark = pytest.mark.usefixtures("task_identity")


class Worker:
    def __init__(self, reply=b""):
        self.asked = []
        self.reply = reply

    def __call__(self, request, seconds):
        self.asked.append((request, seconds))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply or Reply("answer", Request.from_bytes(request).body).to_bytes()


def send(worker, kind, content, *, ttl=30.0):
    message = Message(content, dst_node_id=1, message_type=kind, ttl=ttl)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return make_client_app(worker)(message, context)


def reply_of(message):
    return Reply.from_bytes(unpack(message.content, REPLY))


def test_every_phase_has_a_message_type():
    assert set(MESSAGE_TYPES) == {*PHASES, "hello", "settle"}
    assert MESSAGE_TYPES["mask"] == "train.mask"
    assert len(set(MESSAGE_TYPES.values())) == len(MESSAGE_TYPES)


@pytest.mark.parametrize("phase", MESSAGE_TYPES)
def test_a_phases_bytes_pass_both_ways_unchanged(phase):
    worker, request = Worker(), Request(phase, b"\x00body").to_bytes()
    answer = send(worker, MESSAGE_TYPES[phase], pack(REQUEST, request), ttl=12.0)
    assert worker.asked == [(request, 12.0)]
    assert reply_of(answer) == Reply("answer", b"\x00body")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("query.confirm", pack(REQUEST, Request("unmask", b"").to_bytes())),
        ("query.unmask", pack(REQUEST, b"\xc1 no request")),
        ("query.unmask", pack("other", Request("unmask", b"").to_bytes())),
        ("query.unmask", RecordDict({"fedpt": ConfigRecord({"request": "text"})})),
        ("query.unmask", RecordDict({"fedpt": ArrayRecord({})})),
        ("query.unmask", RecordDict({"fedpt": ConfigRecord({"request": b"", "socket": "/elsewhere"})})),
        ("query.unmask", RecordDict({})),
    ],
    ids=["phase", "bytes", "field", "text", "arrays", "more", "nothing"],
)
def test_what_is_no_request_of_its_type_never_reaches_the_worker(kind, content):
    worker = Worker()
    assert reply_of(send(worker, kind, content)) == Reply("silent", code="request")
    assert worker.asked == []


@pytest.mark.parametrize(
    "failure", [RoundError("the worker at /home/somebody did not answer, of client 7"), b"\xc1 no reply"]
)
def test_a_worker_that_cannot_be_asked_is_one_word(failure):
    answer = send(Worker(failure), "query.hello", pack(REQUEST, Request("hello", b"").to_bytes()))
    assert reply_of(answer) == Reply("silent", code="worker")


def test_a_type_that_is_none_of_ours_is_refused():
    with pytest.raises(ValueError, match="registered"):
        send(Worker(), "evaluate", pack(REQUEST, Request("hello", b"").to_bytes()))
