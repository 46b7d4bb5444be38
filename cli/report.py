"""`fedpt-secure report` and `fedpt-secure compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.errors import reported

if TYPE_CHECKING:
    from fedpt_secure.report import Comparison


def report(
    runs: list[Path] = typer.Argument(..., help="Run directories, or directories that hold some (a sweep)."),
    out: Path | None = typer.Option(
        None, help="Directory for report.html, report.md and report.json. [default: the first RUN]"
    ),
    subject: str | None = typer.Option(
        None, help="Name of the run the first screen speaks of. [default: the first audited, else the first private]"
    ),
    title: str | None = typer.Option(None, help="Heading."),
    json_output: bool = typer.Option(False, "--json", help="Print report.json on standard output."),
) -> None:
    """Write the privacy-utility report of finished runs: one HTML file without network, Markdown, and JSON.

    Exit codes: 0 done, 2 settings, 8 a run directory is missing, unfinished or damaged, 10 files.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.report import compose_report, write_report

        made = compose_report(runs, subject=subject, title=title)
        paths = write_report(made, out or runs[0])
        for path in paths:
            console.print(str(path), style="dim", highlight=False, soft_wrap=True)
    if json_output:
        typer.echo(json.dumps(made.to_json(), indent=2, allow_nan=False))
    else:
        head, out_console = made.headline, Console()
        for name, text in (
            ("Privacy", head.claim),
            ("Utility", head.utility),
            (f"Audit: {head.verdict_kind}", head.verdict),
        ):
            out_console.print(f"[bold]{name}.[/] {escape(text)}", highlight=False)


def compare(
    first: Path = typer.Argument(..., metavar="RUN_A", help="Run directory."),
    second: Path = typer.Argument(..., metavar="RUN_B", help="Run directory."),
    json_output: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
) -> None:
    """Compare two finished runs: promises, losses, costs, and the settings that differ.

    Exit codes: 0 done, 2 settings, 8 a run directory is missing, unfinished or damaged.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.report import compare_runs, find_runs, load_run

        (name_a, path_a), (name_b, path_b) = _two(find_runs([first, second]))
        comparison = compare_runs(load_run(path_a, name_a), load_run(path_b, name_b))
    if json_output:
        typer.echo(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
    else:
        _print(Console(), comparison)


def _two(found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    from fedpt_secure.errors import ConfigError

    if len(found) != 2:
        raise ConfigError(
            f"two runs are compared; these directories hold {len(found)}",
            hint="name two different run directories; `fedpt-secure report` takes any number",
        )
    return found


def _print(out: Console, comparison: Comparison) -> None:
    table = Table(box=box.SIMPLE)
    for heading in ("", *comparison.names):
        table.add_column(escape(heading), overflow="fold")
    for row in comparison.rows:
        table.add_row(*map(escape, row))
    out.print(table)
    if comparison.gain_difference is None:
        out.print("Not judged on the same records: their losses do not compare.", highlight=False)
    else:
        value, low, high = comparison.gain_difference
        out.print(
            f"{escape(comparison.names[1])} gained [bold]{value:+.4f}[/] nats per token more "
            rf"\[{low:.4f}, {high:.4f}] on the same records.",
            highlight=False,
        )
    settings = Table(box=box.SIMPLE, title="Settings that differ")
    for heading in ("setting", *comparison.names):
        settings.add_column(escape(heading), overflow="fold")
    for row in comparison.settings:
        settings.add_row(*map(escape, row))
    out.print(settings if comparison.settings else "All settings are the same.")
    for name, claim in zip(comparison.names, comparison.claims, strict=True):
        out.print(f"[bold]{escape(name)}:[/] {escape(claim)}", highlight=False)
