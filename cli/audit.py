"""`fedpt-secure audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.progress import shown_on

EXIT_VIOLATION = 3


def audit(
    run: Path = typer.Option(..., help="Run directory of a finished run."),
    budget: str | None = typer.Option(
        None, help="Time to take, as 10m or 90s: sizes follow, and what that costs in power is said. [default: full]"
    ),
    claimed_epsilon: float | None = typer.Option(
        None, help="Hold the run to this epsilon. [default: its own, of privacy.json]"
    ),
    shadows: int | None = typer.Option(None, help="Shadow models to train for the RMIA attack. [default: 0]"),
    alpha: float | None = typer.Option(
        None, help="Chance of a false alarm in each decisive statistical check. [default: 0.05]"
    ),
    parts: str | None = typer.Option(None, help="Only these, with commas between. [default: all]"),
    seed: int | None = typer.Option(None, help="Which records are looked at. [default: 0]"),
    fresh: bool = typer.Option(False, "--fresh", help="Do not go on from an earlier audit of this run."),
    json_output: bool = typer.Option(False, "--json", help="Print audit.json on standard output."),
) -> None:
    """Attack a finished run the way an adversary would, and hold it to its epsilon.

    Exit codes: 0 no violation detected, 3 a violation, 2 settings, 4 data, 5 models, 6 privacy or ledgers, 8 run
    directory, 9 black box, 10 files, 130 interrupted (what is done is kept).
    """
    console = Console(stderr=True)
    with reported(console):
        result = _run(
            run,
            {
                "claimed_epsilon": claimed_epsilon,
                "shadows": shadows,
                "alpha": alpha,
                "seed": seed,
                "fresh": fresh,
                "parts": None if parts is None else tuple(part.strip() for part in parts.split(",") if part.strip()),
            },
            budget=budget,
            console=console,
        )
    if json_output:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_audit(Console(), result)
    if result["verdict"]["violation"]:
        raise typer.Exit(EXIT_VIOLATION)


def _run(run: Path, values: dict[str, Any], *, budget: str | None, console: Console) -> dict[str, Any]:
    from fedpt_secure.attacks import AuditSettings, parse_duration, run_audit
    from fedpt_secure.cli.quiet import quiet_libraries
    from fedpt_secure.config import build
    from fedpt_secure.data import Cache
    from fedpt_secure.federation import RunDirectory

    given = {name: value for name, value in values.items() if value is not None}
    if budget is not None:
        given["budget_seconds"] = parse_duration(budget)
    settings = build(AuditSettings, given, command="audit")
    quiet_libraries()
    directory = RunDirectory.open(run)
    with shown_on(console) as progress:
        result = run_audit(directory, settings, cache=Cache(), progress=progress)
    console.print(f"audit: {directory.path / 'audit'}", style="dim", highlight=False, soft_wrap=True)
    return result


def print_audit(console: Console, result: dict[str, Any]) -> None:
    """The checks, what a budget cost, and the verdict."""
    table = Table(box=box.SIMPLE)
    for heading in ("check", "finding", ""):
        table.add_column(heading)
    for check in result["checks"]:
        mark = ("[bold red]VIOLATION[/]" if check["violation"] else "ok") if check["decisive"] else "shown only"
        table.add_row(check["name"], escape(check["sentence"]), mark)
    console.print(table)
    for line in result["budget"]["cost_in_power"]:
        console.print(f"Smaller than in full: {escape(line)}.", highlight=False)
    claim, verdict = result["claim"], result["verdict"]
    if claim["epsilon"] is not None:
        console.print(
            f"Claim: epsilon <= {claim['epsilon']:g} at delta = {claim['delta']:g} for each {escape(claim['unit'])} "
            f"({escape(claim['source'])}).",
            highlight=False,
        )
    style = "bold red" if verdict["violation"] else "bold"
    console.print(f"[{style}]Verdict:[/] {escape(verdict['sentence'])}.", highlight=False)
    console.print(
        f"A correct run would be called a violation with a chance of at most {verdict['false_alarm_bound']:g}.",
        highlight=False,
    )
