"""Progress without a terminal: lines, few of them, and none for what is quick."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fedpt_secure.cli import plain_progress
from fedpt_secure.cli.plain_progress import PlainProgress
from fedpt_secure.cli.progress import TerminalProgress, shown_on


class Log:
    """A console without a terminal and a clock that moves only when told."""

    def __init__(self):
        self._stream = io.StringIO()
        self._now = 0.0
        self.progress = PlainProgress(Console(file=self._stream, width=40), clock=lambda: self._now)

    def wait(self, seconds):
        """Let time pass, ticking twice a second as the thread does."""
        for _ in range(round(seconds * 2)):
            self._now += 0.5
            self.progress.tick()

    @property
    def lines(self):
        return self._stream.getvalue().splitlines()


@pytest.fixture
def log():
    return Log()


def test_a_long_task_says_that_it_began_how_far_it_is_and_that_it_ended(log):
    with log.progress.task("rounds", 8, unit="rounds") as task:
        log.wait(11)
        task.advance()
        task.describe("small LM held-out loss 5.3")
        log.wait(4)
        task.advance(7)
        task.describe("small LM held-out loss 5.1")
        log.wait(1)
    assert log.lines == [
        "rounds: 0/8, 2 s ...",
        "rounds: 1/8, 12 s, small LM held-out loss 5.3 ...",
        "rounds: 8/8, 16 s, small LM held-out loss 5.1",
    ]


def test_quick_tasks_print_nothing_however_many_there_are(log):
    with log.progress.task("rounds", 100) as rounds:
        for _ in range(100):
            with log.progress.task("clients", 8):
                log.wait(1)
            rounds.advance()
    assert all(line.startswith("rounds:") for line in log.lines)
    assert len(log.lines) == 1 + 9 + 1


def test_bytes_are_megabytes_and_an_unknown_total_is_left_out(log):
    with (
        log.progress.task("fetch weights", 8e6, unit="B") as fetch,
        log.progress.task("convert", None, unit="tensors") as convert,
    ):
        log.wait(2)
        fetch.advance(1_500_000)
        convert.advance(34)
        log.wait(10)
    assert log.lines[:4] == [
        "fetch weights: 0.0/8.0 MB, 2 s ...",
        "convert: 2 s ...",
        "fetch weights: 1.5/8.0 MB, 12 s ...",
        "convert: 34 tensors, 12 s ...",
    ]


def test_a_task_that_fails_does_not_look_done(log):
    def fetch():
        with log.progress.task("fetch", 10):
            log.wait(3)
            raise OSError

    with pytest.raises(OSError):
        fetch()
    assert log.lines[-1] == "fetch: 0/10, 3 s, stopped"


def test_names_are_not_markup_and_lines_are_not_wrapped(log):
    log.progress.note("[bold] " + "x" * 60)
    assert log.lines == ["[bold] " + "x" * 60]


def test_a_task_that_makes_no_progress_is_seen_to_last(monkeypatch):
    monkeypatch.setattr(plain_progress, "LASTING", 0.02)
    monkeypatch.setattr(plain_progress, "_TICK", 0.01)
    stream = io.StringIO()
    with shown_on(Console(file=stream)) as progress, progress.task("loading", None):
        deadline = time.monotonic() + 5
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.getvalue().startswith("loading: 0 s ...")


def test_bars_are_for_terminals_only():
    assert isinstance(shown_on(Console(file=io.StringIO(), force_terminal=True)), TerminalProgress)
    assert isinstance(shown_on(Console(file=io.StringIO())), PlainProgress)
