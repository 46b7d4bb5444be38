"""The socket between a client's worker and what carries its messages."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fedpt_secure.errors import RoundError
from fedpt_secure.network import local_socket
from fedpt_secure.network.local_socket import LocalServer, ask

LARGEST = 1 << 20


@pytest.fixture
def place():
    root = Path(tempfile.mkdtemp(prefix="ls"))
    yield root / "worker.sock"
    shutil.rmtree(root)


@pytest.fixture
def listening(place):
    servers, failures = [], []

    def listen(answer=lambda content: content[::-1], largest=LARGEST):
        server = LocalServer(place, answer, largest=largest, failed=failures.append)
        servers.append(server)
        return failures

    yield listen
    for server in servers:
        server.close()


def test_a_request_gets_its_reply(place, listening):
    listening()
    for content in (b"", b"abc", os.urandom(300_000)):
        assert ask(place, content, seconds=10, largest=LARGEST) == content[::-1]


def test_the_socket_is_its_owners_only(place, listening):
    before = os.umask(0)
    try:
        listening()
        assert os.umask(0) == 0, "the process's umask is put back"
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_another_users_process_is_turned_away_unread(place, listening, monkeypatch):
    asked = []
    failures = listening(asked.append)
    monkeypatch.setattr(local_socket.os, "getuid", lambda: 12345)
    with pytest.raises(RoundError):
        ask(place, b"x", seconds=10, largest=LARGEST)
    assert asked == []
    assert "tried to reach the worker" in str(failures[0])


def test_requests_are_answered_at_the_same_time(place, listening):
    barrier = threading.Barrier(3, timeout=20)

    def answer(content):
        barrier.wait()
        return content

    listening(answer)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(ask(place, b"x", seconds=20, largest=LARGEST))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"x"] * 3


def test_too_long_a_message_is_refused_before_it_is_read(place, listening):
    failures = listening(largest=10)
    with pytest.raises(RoundError):
        ask(place, b"x" * 11, seconds=10, largest=LARGEST)
    assert "11 bytes is larger than 10" in str(failures[0])
    listening_reply = b"y" * 20
    place.unlink()
    server = LocalServer(place, lambda content: listening_reply, largest=10, failed=failures.append)
    try:
        with pytest.raises(RoundError, match="20 bytes is larger than 15"):
            ask(place, b"x", seconds=10, largest=15)
    finally:
        server.close()


def test_half_a_message_is_no_message(place, listening):
    asked = []
    failures = listening(asked.append)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(place))
        connection.sendall(struct.pack(">Q", 100) + b"half")
    end = time.monotonic() + 10
    while not failures and time.monotonic() < end:
        time.sleep(0.01)
    assert "closed 96 bytes before the end" in str(failures[0])
    assert asked == []


def test_an_answer_that_fails_closes_the_connection_and_the_next_is_answered(place, listening):
    def answer(content):
        if content == b"bad":
            raise ValueError("no")
        return b"good"

    failures = listening(answer)
    with pytest.raises(RoundError):
        ask(place, b"bad", seconds=10, largest=LARGEST)
    assert isinstance(failures[0], ValueError)
    assert ask(place, b"other", seconds=10, largest=LARGEST) == b"good"


def test_nobody_there_and_nobody_in_time_are_clear_errors(place, listening):
    with pytest.raises(RoundError, match="cannot be asked") as caught:
        ask(place, b"x", seconds=1, largest=LARGEST)
    assert "federation client" in caught.value.hint
    listening(lambda content: time.sleep(5) or b"")
    with pytest.raises(RoundError, match=r"did not answer within 0\.2 s"):
        ask(place, b"x", seconds=0.2, largest=LARGEST)


def test_a_dead_processs_socket_is_replaced_and_a_living_ones_is_not(place, listening):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(place))
    listening()
    with pytest.raises(RoundError, match="another worker listens"):
        LocalServer(place, bytes, largest=LARGEST, failed=print)
    assert ask(place, b"ab", seconds=10, largest=LARGEST) == b"ba"


def test_what_is_no_socket_is_not_replaced(place):
    place.write_text("somebody's file")
    with pytest.raises(RoundError, match="not a socket"):
        LocalServer(place, bytes, largest=LARGEST, failed=print)
    assert place.read_text() == "somebody's file"


def test_a_server_out_of_descriptors_goes_on_when_there_are_some(place, listening, monkeypatch):
    accept, refusals = socket.socket.accept, [OSError(24, "Too many open files")] * 2

    def failing(self):
        if refusals:
            raise refusals.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    failures = listening()
    assert ask(place, b"ab", seconds=10, largest=LARGEST) == b"ba"
    assert [failure.errno for failure in failures] == [24, 24]


def test_one_thread_computes_what_many_ask_one_after_the_other():
    running, most, threads = [], [], set()

    def work(content):
        if content == b"bad":
            raise ValueError("no")
        running.append(1)
        most.append(len(running))
        threads.add(threading.get_ident())
        time.sleep(0.01)
        running.pop()
        return content[::-1]

    one = local_socket.OneThread(work)
    got = []
    callers = [threading.Thread(target=lambda n=n: got.append(one(b"a%d" % n))) for n in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(got) == [b"%da" % n for n in range(5)]
    assert (max(most), len(threads)) == (1, 1)
    with pytest.raises(ValueError, match="no"):
        one(b"bad")
    assert one(b"ok") == b"ko"


def test_a_closed_server_leaves_no_thread_and_no_socket(place):
    server = LocalServer(place, bytes, largest=LARGEST, failed=print)
    assert ask(place, b"", seconds=10, largest=LARGEST) == b""
    server.close()
    assert not server._thread.is_alive()
    assert not place.exists()
