"""Tiny wheels, a cache in a temporary folder, and a progress that remembers."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpt_secure.data.artefacts import Artefact


class Recorder:
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: dict[str, float] = {}
        self.totals: dict[str, float | None] = {}

    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[Recorder._Task]:
        self.totals[name] = total
        self.done.setdefault(name, 0)
        yield Recorder._Task(self, name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @dataclasses.dataclass
    class _Task:
        recorder: Recorder
        name: str

        def advance(self, amount: float = 1) -> None:
            self.recorder.done[self.name] += amount

        def describe(self, text: str) -> None:
            pass


@pytest.fixture
def progress() -> Recorder:
    return Recorder()


MakeWheel = Callable[..., tuple[Path, Artefact]]


@pytest.fixture
def make_wheel(tmp_path: Path) -> MakeWheel:
    """Build `tiny-text` 1.0 with given members; returns the wheel and an artefact that pins it."""

    def make(
        members: dict[str, bytes] | None = None,
        *,
        selected: tuple[str, ...] = ("tiny_text/data.txt",),
        limit: int = 10**6,
    ) -> tuple[Path, Artefact]:
        folder = tmp_path / "index"
        folder.mkdir(exist_ok=True)
        wheel = folder / "tiny_text-1.0-py3-none-any.whl"
        members = {"tiny_text/data.txt": b"hello\n"} if members is None else members
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in members.items():
                archive.writestr(path, content)
            info = "tiny_text-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return wheel, pin(wheel, selected=selected, limit=limit)

    return make


def pin(wheel: Path, *, selected: tuple[str, ...], limit: int = 10**6) -> Artefact:
    content = wheel.read_bytes()
    return Artefact(
        name="tiny",
        requirement="tiny-text==1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        members=selected,
        unpacked_limit=limit,
        licence="none",
        description="a test",
    )
