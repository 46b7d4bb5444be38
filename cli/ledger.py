"""`fedpt-secure ledger show` and `fedpt-secure ledger set-budget`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.errors import reported

if TYPE_CHECKING:
    from fedpt_secure.report import LedgerSummary

ledger = typer.Typer(
    name="ledger",
    help="What a client's data was used for, and what its owner allows.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@ledger.command()
def show(
    directory: Path = typer.Argument(..., help="A client's directory, or one that holds several (a run, --ledgers)."),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Show releases by run, epsilon spent, and the budget.

    Exit codes: 0 done, 6 a ledger is missing, damaged, changed by hand, or of another version.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.report import find_ledgers, summarise_ledger

        summaries = [summarise_ledger(place) for place in find_ledgers(directory)]
    if json_output:
        typer.echo(json.dumps({"ledgers": [item.to_json() for item in summaries]}, indent=2, allow_nan=False))
    elif len(summaries) == 1:
        _print_one(Console(), summaries[0])
    else:
        _print_many(Console(), summaries)


@ledger.command("set-budget")
def set_budget(
    directory: Path = typer.Argument(..., help="The client's directory."),
    epsilon: float = typer.Option(..., help="The most that everything together may cost; inf for no limit."),
    delta: float | None = typer.Option(
        None, help="At which epsilon is computed. [default: as before; 1e-05 for a new ledger]"
    ),
    unit: str | None = typer.Option(
        None, help="record, or client for everything it has. [default: as before; record for a new ledger]"
    ),
    by: str = typer.Option("", "--by", help="Who decided, or why; kept in the ledger."),
    create: bool = typer.Option(False, "--create", help="Begin a ledger where there is none."),
    confirm_raise: bool = typer.Option(
        False, "--confirm-raise", help="The data's owner agrees that more than before may be spent."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Set what a client's data may be used for, over all runs and servers. Every budget there was stays visible.

    Exit codes: 0 done, 6 not acceptable, or the ledger is missing, damaged or of another version.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.report import change_budget, summarise_ledger

        spent = change_budget(
            directory, epsilon=epsilon, delta=delta, unit=unit, by=by, create=create, confirm_raise=confirm_raise
        )
        summary = summarise_ledger(directory)
        if spent > epsilon:
            console.print(
                "[bold]note:[/] that is less than what is spent, which cannot be undone: the client declines all "
                "further work",
                highlight=False,
                soft_wrap=True,
            )
    if json_output:
        typer.echo(json.dumps(summary.to_json(), indent=2, allow_nan=False))
    else:
        _print_one(Console(), summary)


def _print_one(out: Console, summary: LedgerSummary) -> None:
    if summary.runs:
        table = Table(box=box.SIMPLE)
        table.add_column("run", no_wrap=True)
        for heading in ("mode", "releases", "steps", "epsilon alone"):
            table.add_column(heading)
        for run in summary.runs:
            modes = ", ".join(run.modes)
            table.add_row(run.run_id, modes, str(run.releases), str(run.steps), _epsilon(run.epsilon))
        out.print(table)
    else:
        out.print("Nothing was released.")
    out.print(f"Spent: {escape(summary.claim())}", highlight=False)
    for index, item in enumerate(reversed(summary.budgets)):
        by = f", by {escape(item.set_by)}" if item.set_by else ""
        out.print(
            f"{'Budget' if index == 0 else 'Before'}: {_limit(item.epsilon)} at delta = {item.delta:g} for each "
            f"{item.unit}, set {item.set_at}{by}.",
            highlight=False,
        )
    if summary.left is not None:
        out.print(f"Left: {summary.left:g}.", highlight=False)


def _print_many(out: Console, summaries: list[LedgerSummary]) -> None:
    table = Table(box=box.SIMPLE)
    for heading in ("client", "runs", "releases", "epsilon spent", "budget", "left", "delta", "unit"):
        table.add_column(heading)
    for item in summaries:
        table.add_row(
            escape(item.directory.name),
            str(len(item.runs)),
            str(sum(run.releases for run in item.runs)),
            _epsilon(item.epsilon),
            _limit(item.budget.epsilon),
            "" if item.left is None else f"{item.left:g}",
            f"{item.budget.delta:g}",
            item.budget.unit,
        )
    out.print(table)
    out.print(f"The first: {escape(summaries[0].claim())}", highlight=False)


def _epsilon(value: float | None) -> str:
    return "no promise" if value is None else f"<= {value:g}"


def _limit(epsilon: float) -> str:
    return "no limit" if math.isinf(epsilon) else f"epsilon {epsilon:g}"
