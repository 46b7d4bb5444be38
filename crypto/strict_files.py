"""Small files at the trust boundary: read whole and strictly, or not at all; written once, never replaced.

A file is refused before it is parsed when it is no regular file, too large, or, if it is to be secret, open to other
users. It is JSON of one known format, in exactly the bytes that this package would have written: two parsers cannot
read two things out of it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fedpt_secure.crypto.errors import ParameterError
from fedpt_secure.crypto.structs import resolved

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


_File = TypeVar("_File", bound=msgspec.Struct)


def to_json(content: msgspec.Struct) -> bytes:
    """The one accepted form of a file: fields in their order, two-space indent, UTF-8, a final newline."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def from_json(content: bytes, kinds: Mapping[str, type[_File]], *, largest: int) -> _File:
    """The file that `to_json` made these bytes from.

    Args:
        kinds: the accepted formats and their fields.

    Raises:
        ParameterError: the bytes are too many, no JSON, of another format or version, have other fields, or are not in
            the one accepted form. The message never quotes more of the content than its format.
    """
    wanted = " or ".join(repr(name) for name in kinds)
    if len(content) > largest:
        raise ParameterError(f"a {wanted} file has at most {largest} bytes, not {len(content)}")
    try:
        declared = msgspec.json.decode(content, type=_AnyFile).format
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ParameterError(f"not a {wanted} file: no JSON object with a format") from None
    if declared not in kinds:
        raise ParameterError(
            f"the file says it is {declared[:40]!r}; {wanted} is needed",
            hint="give the file of that kind, or use the version of fedpt-secure that wrote this one",
        )
    try:
        decoded = msgspec.json.decode(content, type=kinds[declared])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ParameterError(f"not a {declared!r} file: {error}") from None
    if to_json(decoded) != content:
        raise ParameterError(
            f"a {declared!r} file is not in its canonical form: edited by hand, or changed on its way",
            hint="send it as an attachment rather than as text; do not edit it, make a new one",
        )
    return decoded


def from_hex(text: str, field: str, *, size: int) -> bytes:
    """`size` bytes from lower-case hexadecimal.

    Raises:
        ParameterError: the text is something else; it is not quoted, for it may be secret.
    """
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size or value.hex() != text:
        raise ParameterError(f"{field} is not {2 * size} lower-case hexadecimal digits")
    return value


def read_file(path: Path, *, largest: int, secret: bool = False) -> bytes:
    """The content of a regular file.

    Args:
        secret: refuse a file that other users may read or write.

    Raises:
        ParameterError: it is no regular file, too large, or open to others.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK the opening of a named pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ParameterError(f"{path} is no regular file")
        if secret and mode & _OTHERS:
            raise ParameterError(
                f"{path} holds a secret key and is open to other users (mode {stat.S_IMODE(mode):04o})",
                hint=f"if nobody else can have read it: chmod 600 {path}; otherwise make a new identity",
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(largest + 1)
    finally:
        os.close(descriptor)
    if len(content) > largest:
        raise ParameterError(f"{path} is larger than {largest} bytes: not a key or roster file")
    return content


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that is not there yet: whole or not at all, also after a power cut.

    Raises:
        FileExistsError: there is something at `path`; it is unchanged.
        OSError: the disk is full, the place not writable, or its file system has no hard links.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(content)
            file.flush()
            os.fsync(handle)
        # A link, unlike a rename, fails where a file stands already.
        os.link(partial, path)
        try:
            _sync(path.parent)
        except BaseException:
            path.unlink()
            raise
    except FileExistsError as error:
        raise FileExistsError(error.errno, "the file exists and is never replaced", str(path)) from None
    finally:
        Path(partial).unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Flush a directory's entries, so that a new name survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@resolved
class _AnyFile(msgspec.Struct, frozen=True):
    format: str
