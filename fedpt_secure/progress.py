"""What long work reports to. The terminal's bar implements it in `cli`; `SILENT` ignores everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""

    def describe(self, text: str) -> None:
        """Replace the text behind the bar (the latest loss, a file name)."""


class Progress(Protocol):
    """A place to show tasks and one-line notes."""

    def task(self, name: str, total: float | None, *, unit: str = "") -> AbstractContextManager[Task]:
        """Open a bar of `total` units (None: unknown) for the length of a `with` block."""

    def note(self, text: str) -> None:
        """Show one line that stays."""


class _SilentTask:
    def advance(self, amount: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[Task]:
        yield _SilentTask()

    def note(self, text: str) -> None:
        pass


SILENT = _Silent()
