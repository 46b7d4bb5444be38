"""`fedpt-secure fetch`."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.progress import shown_on


def fetch(
    names: list[str] | None = typer.Argument(None, help="Artefacts to fetch; all by default."),
    status: bool = typer.Option(False, "--status", help="Only show what is there."),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Fetch the built-in data and weights into the cache, verified, for use offline afterwards."""
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.data import ARTEFACTS, Cache

        cache = Cache()
        if not status:
            with shown_on(console) as progress:
                cache.fetch(names or list(ARTEFACTS), progress)
        rows = [
            {
                "name": item.artefact.name,
                "requirement": item.artefact.requirement,
                "state": item.state,
                "licence": item.artefact.licence,
                "directory": str(item.directory),
            }
            for item in cache.status()
        ]
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title=f"Cache {cache.root}")
    for column in ("name", "requirement", "state", "licence"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], row["requirement"], row["state"], row["licence"])
    Console().print(table)
