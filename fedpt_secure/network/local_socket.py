"""Request and reply over a Unix socket that only its owner can open.

One connection carries one request and its reply, each after its length in eight bytes, big endian. The socket's mode is
0600 and its peer's user must be the worker's own: whoever else is on the machine is turned away unread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from fedpt_secure.errors import RoundError

_LENGTH = struct.Struct(">Q")
_PEER = struct.Struct("3i")
_BACKLOG = 64
_SECONDS_AFTER_FAILURE = 0.2
_SECONDS_TO_END = 5.0


def ask(path: Path, request: bytes, *, seconds: float, largest: int) -> bytes:
    """Send one request, wait for its reply.

    Raises:
        RoundError: nobody listens there, the reply is too long or cut off, or the time is over.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            _send(connection, request)
            return _receive(connection, largest)
    except TimeoutError:
        raise RoundError(f"the worker at {path} did not answer within {seconds:g} s") from None
    except OSError as error:
        raise RoundError(
            f"the worker at {path} cannot be asked: {error.strerror or error}", hint="is `federation client` running?"
        ) from None


class LocalServer:
    """Answers requests, one thread a connection, until it is closed.

    Args:
        path: of the socket; one that a killed process left is replaced, one that answers is not.
        answer: a request's reply. An exception closes the connection without a reply.
        largest: bytes of a request.
        failed: told of exceptions in `answer` and of strangers.

    Raises:
        RoundError: another process listens there.
        OSError: the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        answer: Callable[[bytes], bytes],
        *,
        largest: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        _take_over(path)
        self._path, self._answer, self._largest, self._failed = path, answer, largest, failed
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        os.chmod(path, 0o600)
        self._listener.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._accept, name="worker socket", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, remove the socket. Answers under way are finished by their own threads."""
        self._closed = True
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not on every system does a listener that never connected shut down
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone leaves the thread in `accept`
        self._listener.close()
        self._thread.join(_SECONDS_TO_END)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError) as error:
                if self._closed:
                    return
                self._failed(error)  # out of descriptors or threads, for now
                time.sleep(_SECONDS_AFTER_FAILURE)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                require_own_user(connection)
                request = _receive(connection, self._largest)
                _send(connection, self._answer(request))
            except BaseException as error:
                self._failed(error)


class OneThread:
    """A function that one thread of its own computes, whatever threads call it; calls wait for one another.

    What the thread has allocated it uses again, so that memory stays flat however many connections come. It ends with
    the process: work under way is abandoned, as by a kill.

    Args:
        work: the function.
    """

    def __init__(self, work: Callable[[bytes], bytes]) -> None:
        self._work = work
        self._calls: queue.SimpleQueue[tuple[bytes, Future[bytes]]] = queue.SimpleQueue()
        threading.Thread(target=self._compute, name="answers", daemon=True).start()

    def __call__(self, content: bytes) -> bytes:
        """The function's value, or its exception."""
        result: Future[bytes] = Future()
        self._calls.put((content, result))
        return result.result()

    def _compute(self) -> None:
        while True:
            content, result = self._calls.get()
            try:
                result.set_result(self._work(content))
            except BaseException as error:
                result.set_exception(error)


def require_own_user(connection: socket.socket) -> None:
    """Accept a peer of this process's own user.

    Raises:
        RoundError: it is another user's.
    """
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        raise RoundError(f"user {uid} tried to reach the worker of user {os.getuid()}")


def _take_over(path: Path) -> None:
    """Remove a dead process's socket.

    Raises:
        RoundError: the socket is alive, or something else lies there.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise RoundError(f"{path} is not a socket, and is not replaced")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise RoundError(f"another worker listens at {path}", hint="one `federation client` a folder")


def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket, largest: int) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > largest:
        raise RoundError(f"a message of {length} bytes is larger than {largest}")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts, missing = [], length
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise RoundError(f"the connection was closed {missing} bytes before the end of a message")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
