"""A round on the server's disk: every message it accepted, every client it gave up, every phase it closed.

The server's side of a round is a function of these and of nothing else, so a restarted server that is told them again
stands where the killed one stood. Nothing in the file is secret from the server: it is what clients sent to it.

The file opens with a digest of the round's announcement, which is the same for the same round and attempt only. Records
follow, each with its length and a checksum; each is on disk before the server acts on it. A last record that was cut
off by a crash was not acted on, and is dropped; damage anywhere else is an error.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from fedpt_secure import files
from fedpt_secure.crypto.structs import resolved
from fedpt_secure.errors import RunDirectoryError

_MAGIC = b"fedpt-secure/journal/1\n"
_DIGEST_BYTES = 32
_HEAD_BYTES = 12
_LARGEST_RECORD = 1 << 30
_WAY_OUT = "moved away, the round under way counts as lost, and the run goes on"
Phase = Literal["advertise", "share_keys", "mask", "confirm", "unmask"]
"""The phases of a round, as `federation.PHASES` has them."""


@resolved
class Began(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag=1):
    """The round began, as this attempt."""

    round_index: int
    attempt: int


@resolved
class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag=2):
    """A client's message was accepted."""

    phase: Phase
    client_id: str
    body: bytes


@resolved
class Lost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag=3):
    """A client dropped out of the round in this phase."""

    phase: Phase
    client_id: str
    why: str
    declined: str = ""


@resolved
class Closed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag=4):
    """The phase is over; what was accepted of it is all there is."""

    phase: Phase
    seconds: float


Entry = Began | Accepted | Lost | Closed


class RoundJournal:
    """The journal of one round at a time.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = False

    def entries(self) -> list[Entry]:
        """What the file holds, `Began` first; nothing where there is no file.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        return self._read()[1] if self._path.exists() else []

    def begun(self) -> Began | None:
        """The round that the file is about; None where there is no file.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        return next((entry for entry in self.entries() if isinstance(entry, Began)), None)

    def open(self, round_index: int, attempt: int, announcement: bytes) -> list[Entry]:
        """Go on with the file, or begin it; what it holds so far.

        Raises:
            RunDirectoryError: the file is damaged, or is about another announcement.
        """
        digest = hashlib.sha256(announcement).digest()
        if not self._path.exists():
            files.write_bytes(self._path, _MAGIC + digest + _framed(Began(round_index, attempt)), mode=0o600)
        found, entries = self._read()
        if found != digest:
            raise RunDirectoryError(
                f"{self._path} is about another announcement than that of round {round_index}, attempt {attempt}",
                hint=f"with the version that began the round it goes on; {_WAY_OUT}",
            )
        self._open = True
        return entries

    def write(self, entry: Entry) -> None:
        """Add an entry; on disk when this returns."""
        if not self._open:
            raise RunDirectoryError("the journal is not open")
        with self._path.open("ab") as stream:
            stream.write(_framed(entry))
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """The round's result is durable elsewhere."""
        self._open = False
        if self._path.exists():
            self._path.unlink()
            files.sync_directory(self._path.parent)

    def _read(self) -> tuple[bytes, list[Entry]]:
        """The announcement's digest and the entries; a half-written last one is cut off."""
        with self._path.open("rb") as stream:
            head = stream.read(len(_MAGIC) + _DIGEST_BYTES)
            if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _DIGEST_BYTES:
                raise RunDirectoryError(
                    f"{self._path} is not a journal of a round, or of another version", hint=_WAY_OUT
                )
            entries, end = [], stream.tell()
            for entry, end in _entries(stream, self._path):  # noqa: B007 - where the last whole one ends
                entries.append(entry)
            size = self._path.stat().st_size
        if end < size:
            with self._path.open("r+b") as stream:
                stream.truncate(end)
                os.fsync(stream.fileno())
        return head[len(_MAGIC) :], entries


def _framed(entry: Entry) -> bytes:
    content = msgspec.msgpack.encode(entry)
    return len(content).to_bytes(8, "big") + zlib.crc32(content).to_bytes(4, "big") + content


def _entries(stream: BinaryIO, path: Path) -> Iterator[tuple[Entry, int]]:
    while True:
        head = stream.read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            return
        length = int.from_bytes(head[:8], "big")
        if length == 0:
            # No record is empty: what a power cut leaves of a write is often zeros.
            if any(head) or any(stream.read()):
                raise RunDirectoryError(f"{path} is damaged: an empty record", hint=_WAY_OUT)
            return
        if length > _LARGEST_RECORD:
            raise RunDirectoryError(f"{path} is damaged: a record of {length} bytes", hint=_WAY_OUT)
        content = stream.read(length)
        if len(content) < length:
            return
        whole = zlib.crc32(content) == int.from_bytes(head[8:], "big")
        if not whole and not stream.read(1):
            return  # the last write, of which the disk kept the length but not all of the content
        try:
            if not whole:
                raise RunDirectoryError(f"{path} is damaged: a record does not match its checksum", hint=_WAY_OUT)
            entry = msgspec.msgpack.decode(content, type=Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RunDirectoryError(f"{path} is damaged: {error}", hint=_WAY_OUT) from None
        yield entry, stream.tell()
