"""Clients over a mailbox whose nodes come, go, lie and send nonsense."""

from __future__ import annotations

import time

import pytest

from fedpt_secure.flower.grid_transport import Delivery, GridTransport
from fedpt_secure.network.transport import Reply, Request

POLL = 0.01
ANSWER = Reply("answer", b"yes").to_bytes()


class Mailbox:
    """Nodes by number; `answers[node](request)` is what a node sends back, None for nothing."""

    def __init__(self, *nodes):
        self.present = set(nodes)
        self.answers = {node: self.behave(node) for node in nodes}
        self.sent = []
        self.forgotten = set()
        self.extra = []
        self._count = 0
        self._waiting = {}

    @staticmethod
    def behave(node):
        def answer(request):
            return Reply("answer", f"client {node}".encode() if request.phase == "hello" else request.body).to_bytes()

        return answer

    def nodes(self):
        return frozenset(self.present)

    def send(self, kind, bodies, *, ttl):
        sent = {}
        for node, body in bodies.items():
            self._count += 1
            message = f"message {self._count}"
            sent[message] = node
            request = Request.from_bytes(body)
            self.sent.append((kind, node, request, ttl))
            self._waiting[message] = (node, self.answers[node](request))
        return sent

    def collect(self, messages):
        found = []
        for message in list(messages):
            node, answer = self._waiting.get(message, (None, None))
            if answer is not None:
                del self._waiting[message]
                found.append(answer if isinstance(answer, Delivery) else Delivery(message, node, answer))
        more, self.extra = self.extra, []
        return more + found  # what should not be there comes first

    def forget(self, messages):
        self.forgotten |= set(messages)


def accept(body):
    return body.decode() if body.startswith(b"client") else None


@pytest.fixture
def mailbox():
    return Mailbox(1, 2, 3)


@pytest.fixture
def transport(mailbox):
    transport = GridTransport(mailbox, poll_seconds=POLL)
    assert transport.gather(b"who", accept, seconds=5) == {"client 1", "client 2", "client 3"}
    return transport


def exchange(transport, phase="advertise", *, seconds=0.2, clients=("client 1", "client 2", "client 3")):
    got = {}

    def receive(client, reply):
        assert client not in got, "a client's reply came twice"
        got[client] = reply

    transport.exchange(phase, {client: client.encode() for client in clients}, receive, seconds=seconds)
    return got


def test_every_client_gets_its_own_bytes_as_the_phases_message_type(transport, mailbox):
    mailbox.sent.clear()
    got = exchange(transport, "mask")
    assert {client: reply.body for client, reply in got.items()} == {
        client: client.encode() for client in ("client 1", "client 2", "client 3")
    }
    assert {(kind, node, request) for kind, node, request, _ in mailbox.sent} == {
        ("train.mask", node, Request("mask", f"client {node}".encode())) for node in (1, 2, 3)
    }


def test_the_time_to_live_of_a_message_is_the_phases(transport, mailbox):
    mailbox.sent.clear()
    exchange(transport, seconds=77.0)
    assert {ttl for *_, ttl in mailbox.sent} == {77.0}


def test_who_is_known_is_not_asked_again(transport, mailbox):
    mailbox.sent.clear()
    mailbox.present.add(4)
    mailbox.answers[4] = Mailbox.behave(4)
    assert "client 4" in transport.gather(b"who", accept, seconds=1)
    assert [(node, request.phase) for _, node, request, _ in mailbox.sent] == [(4, "hello")]


def test_a_node_that_proves_no_identity_is_nobody_and_is_asked_again():
    mailbox = Mailbox(1, 2)
    mailbox.answers[2] = lambda request: Reply("answer", b"a stranger").to_bytes()
    transport = GridTransport(mailbox, poll_seconds=POLL)
    assert transport.gather(b"who", accept, seconds=1) == {"client 1"}
    mailbox.answers[2] = Mailbox.behave(2)
    assert transport.gather(b"who", accept, seconds=1) == {"client 1", "client 2"}


def test_a_declining_or_silent_answer_to_hello_is_nobodys():
    mailbox = Mailbox(1)
    for kind in ("declined", "silent"):
        mailbox.answers[1] = lambda request, kind=kind: Reply(kind, b"client 1", "word").to_bytes()
        assert GridTransport(mailbox, poll_seconds=POLL).gather(b"who", accept, seconds=1) == frozenset()


def test_silence_ends_at_the_deadline(transport, mailbox):
    mailbox.answers[2] = lambda request: None
    start = time.monotonic()
    got = exchange(transport, seconds=0.3)
    assert 0.3 <= time.monotonic() - start < 1.0
    assert set(got) == {"client 1", "client 3"}


def test_all_answers_end_the_phase_before_its_deadline(transport):
    start = time.monotonic()
    exchange(transport, seconds=60)
    assert time.monotonic() - start < 5


def test_a_late_reply_is_dropped(transport, mailbox):
    late = {}

    def slow(request):
        late["message"] = f"message {mailbox._count}"

    mailbox.answers[2] = slow
    assert set(exchange(transport, seconds=0.05)) == {"client 1", "client 3"}
    assert late["message"] in mailbox.forgotten
    mailbox.answers[2] = Mailbox.behave(2)
    mailbox.extra = [Delivery(late["message"], 2, Reply("answer", b"of the phase before").to_bytes())]
    assert exchange(transport, "confirm")["client 2"].body == b"client 2"


def test_a_second_reply_to_one_message_is_dropped(transport, mailbox):
    mailbox.answers[1] = lambda request: Delivery(f"message {mailbox._count}", 1, ANSWER)

    def twice(request):
        message = f"message {mailbox._count}"
        mailbox.extra = [Delivery(message, 2, ANSWER), Delivery(message, 2, Reply("answer", b"again").to_bytes())]

    mailbox.answers[2] = twice
    assert exchange(transport)["client 2"].body == b"yes"


def test_a_reply_in_another_nodes_name_is_dropped_and_its_owner_still_waited_for(transport, mailbox):
    def forged(request):
        mailbox.extra = [Delivery(f"message {mailbox._count}", 3, Reply("answer", b"forged").to_bytes())]
        return Reply("answer", b"own").to_bytes()

    mailbox.answers[2] = forged
    for _ in range(5):
        assert exchange(transport)["client 2"].body == b"own"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", b"\x93\xa6answer\xc4\x00", b"garbage" * 1000, None],
    ids=["nothing", "no message", "cut", "long", "error"],
)
def test_garbage_and_errors_count_as_silence_and_the_node_proves_itself_anew(transport, mailbox, content):
    mailbox.answers[2] = lambda request: Delivery(f"message {mailbox._count}", 2, content)
    got = exchange(transport)
    assert got["client 2"] == Reply("silent", code="node")
    assert got["client 1"].kind == "answer"
    mailbox.sent.clear()
    mailbox.answers[2] = Mailbox.behave(2)
    assert "client 2" in transport.gather(b"who", accept, seconds=1)
    assert [node for _, node, *_ in mailbox.sent] == [2]


def test_what_the_link_says_in_a_nodes_place_is_silence(transport, mailbox):
    mailbox.answers[2] = lambda request: Delivery(f"message {mailbox._count}", None, ANSWER)
    assert exchange(transport)["client 2"] == Reply("silent", code="node")


def test_an_unknown_client_is_not_waited_for(transport):
    start = time.monotonic()
    assert exchange(transport, clients=("client 9",), seconds=60) == {}
    assert time.monotonic() - start < 5


def test_a_node_that_vanishes_is_not_waited_for(transport, mailbox, monkeypatch):
    monkeypatch.setattr("fedpt_secure.flower.grid_transport._NODES_SECONDS", 0.05)

    def vanish(request):
        mailbox.present.discard(2)

    mailbox.answers[2] = vanish
    start = time.monotonic()
    assert set(exchange(transport, seconds=60)) == {"client 1", "client 3"}
    assert time.monotonic() - start < 5
    assert transport.gather(b"who", accept, seconds=1) == {"client 1", "client 3"}


def test_a_client_that_moved_to_another_node_is_reached_there(transport, mailbox):
    mailbox.present.discard(2)
    mailbox.present.add(7)
    mailbox.answers[7] = Mailbox.behave(2)
    assert "client 2" in transport.gather(b"who", accept, seconds=1)
    assert exchange(transport, clients=("client 2",))["client 2"].kind == "answer"
    assert mailbox.sent[-1][1] == 7
