"""Threads may decode a message type at once from the start: every type is resolved where it is defined."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from fedpt_secure.crypto.structs import resolved

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("fedpt_secure", "crypto", "attacks", "cli") for path in (ROOT / name).rglob("*.py")]
RACE = """
from __future__ import annotations
import sys, threading, time
import msgspec
from fedpt_secure.crypto.structs import resolved
mark = resolved if sys.argv[1] == "resolved" else lambda kind: kind
def slowly():  # evaluated when the fields of Part are looked up, in the middle of those of Message
    time.sleep(0.05)
    return bytes
@mark
class Part(msgspec.Struct, forbid_unknown_fields=True):
    a: int
    b: slowly()
@mark
class Message(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parts: list[Part] | None = None
    count: int = 0
content = msgspec.msgpack.encode({"name": "x", "parts": [{"a": 1, "b": b"1"}], "count": 4})
start = threading.Barrier(4)
right = []
def decode():
    start.wait()
    right.append(msgspec.msgpack.decode(content, type=Message) == Message("x", [Part(1, b"1")], 4))
threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(right != [True] * 4)
"""


def race(which: str) -> int:
    """Exit code of threads that decode a fresh type at once, in a process of their own."""
    return subprocess.run([sys.executable, "-c", RACE, which], capture_output=True, timeout=300, check=False).returncode


def structs(source: str) -> dict[str, bool]:
    """Names of the `msgspec.Struct`s that a source defines, and whether each is resolved there."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    called = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Expr)}
    return {
        one.name: "resolved" in map(ast.unparse, one.decorator_list) or f"resolved({one.name})" in called
        for one in classes
        if any(ast.unparse(base) in ("msgspec.Struct", "Struct") for base in one.bases)
    }


def test_every_message_type_is_resolved_where_it_is_defined():
    found = {f"{path.stem}.{name}": there for path in SOURCES for name, there in structs(path.read_text()).items()}
    assert {"transport.Reply", "messages.MaskedVector", "announcement.Announcement"} <= set(found)
    assert [name for name, there in found.items() if not there] == []


def test_a_type_that_is_not_resolved_is_seen():
    """The broken variant."""
    source = "@resolved\nclass A(msgspec.Struct, tag=1):\n  a: int\nclass B(msgspec.Struct):\n  b: int\n"
    assert structs(source) == {"A": True, "B": False}
    assert structs(source + "resolved(B)") == {"A": True, "B": True}


def test_threads_decode_a_resolved_types_first_messages_at_once():
    assert race("resolved") == 0


@pytest.mark.skipif(version("msgspec") != "0.22.0", reason="whether another msgspec still needs it is to be looked at")
def test_threads_that_decode_an_unresolved_types_first_messages_at_once_die():
    """The broken variant: what a server did, rarely, in a federation's first round."""
    assert race("unresolved") == -signal.SIGSEGV


def test_a_resolved_type_is_the_type_itself_and_one_that_cannot_be_looked_up_is_refused_at_once():
    class Known(msgspec.Struct):
        a: int

    class Unknown(msgspec.Struct):
        a: NoSuchType  # noqa: F821

    assert resolved(Known) is Known
    with pytest.raises(NameError):
        resolved(Unknown)
