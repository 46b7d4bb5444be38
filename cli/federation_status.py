"""`fedpt-secure federation status`: a server's or a client's status, once or as a live table."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedpt_secure.network.status import Status

_SECONDS = 1.0
_OVER = ("done", "failed", "stopped")


def show(folder: Path, *, watch: bool, as_json: bool, stop: threading.Event) -> None:
    """Print the status of a folder; with `watch` again and again, until it is over.

    Raises:
        RunDirectoryError: there is no status, or it is damaged.
    """
    from fedpt_secure.network.folder import ServerFolder
    from fedpt_secure.network.status import is_running, read_status

    path = ServerFolder(folder).status  # a client's has the same name
    status = read_status(path)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(status) | {"running": is_running(status)}, indent=2))
        return
    if not watch:
        Console().print(table_of(status, running=is_running(status)))
        return
    with Live(table_of(status, running=is_running(status)), refresh_per_second=2) as live:
        while status.state not in _OVER and is_running(status) and not stop.wait(_SECONDS):
            status = read_status(path)
            live.update(table_of(status, running=is_running(status)))


def table_of(status: Status, *, running: bool) -> Group:
    """The status for people: one line about the run, and one a client."""
    state = status.state if running or status.state in _OVER else f"{status.state}, but its process is gone"
    where = f"round {status.round_index} of {status.rounds}" + (f", {status.phase}" if status.phase else "")
    lines = [Text(f"{status.role}: {state}; {where}; {status.aborted} rounds aborted; updated {status.updated}")]
    if status.why:
        lines.append(Text(f"last: {status.why}"))
    if status.claim:
        lines.append(Text(status.claim))
    if not status.clients:
        return Group(*lines)
    table = Table(caption="epsilon: of this run alone, at most, in its unit and at its delta")
    table.add_column("client")
    table.add_column("there")
    table.add_column("phase")
    table.add_column("answer")
    for heading in ("in sums", "dropped", "epsilon"):
        table.add_column(heading, justify="right")
    table.add_column("last heard")
    for client, line in sorted(status.clients.items()):
        epsilon = "-" if line.epsilon is None else f"{line.epsilon:g}"
        there = "yes" if line.reachable else "no"
        cells = (client, there, line.phase, line.outcome, str(line.rounds), str(line.dropped), epsilon, line.seen)
        table.add_row(*(Text(cell) for cell in cells))
    return Group(*lines, table)
