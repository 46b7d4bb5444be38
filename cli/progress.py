"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedpt_secure.cli.plain_progress import PlainProgress


def shown_on(console: Console) -> AbstractContextManager[TerminalProgress | PlainProgress]:
    """What shows progress on this console for the length of a `with` block."""
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


class TerminalProgress:
    """`fedpt_secure.progress.Progress` as bars, by rich."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=False,
        )

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[_TerminalTask]:
        identifier = self._bars.add_task(name, total=total, note="", unit=unit)
        try:
            yield _TerminalTask(self._bars, identifier)
        finally:
            # Nested tasks come and go by the dozen; only those at the top level stay on screen.
            self._bars.remove_task(identifier)

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)


class _TerminalTask:
    def __init__(self, bars: Progress, identifier: TaskID) -> None:
        self._bars = bars
        self._identifier = identifier

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._identifier, amount)

    def describe(self, text: str) -> None:
        self._bars.update(self._identifier, note=text)


class _Amount(ProgressColumn):
    """Done of total with its unit; bytes as megabytes."""

    _count = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        if task.fields.get("unit") == "B":
            total = f"/{task.total / 1e6:.1f}" if task.total else ""
            return Text(f"{task.completed / 1e6:.1f}{total} MB")
        if task.total is None:
            return Text("")
        return Text(f"{self._count.render(task)} {task.fields.get('unit', '')}")
