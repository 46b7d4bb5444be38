"""`fedpt-secure account`."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.errors import reported

QUESTION, MODE, OUTPUT = "What is promised", "Where the noise is born", "Output"


def account(
    epsilon: float | None = typer.Option(None, help="Calibrate the noise to this.", rich_help_panel=QUESTION),
    noise_multiplier: float | None = typer.Option(
        None, help="The reverse: what does this noise promise?", rich_help_panel=QUESTION
    ),
    delta: float | None = typer.Option(None, help="[default: 1e-05]", rich_help_panel=QUESTION),
    rounds: int = typer.Option(..., help="Rounds that a client takes part in.", rich_help_panel=QUESTION),
    rate: float | None = typer.Option(
        None,
        help="Public chance that a record (mode client: a client) is in a step. [default: 1]",
        rich_help_panel=QUESTION,
    ),
    local_steps: int | None = typer.Option(
        None, help="Noised steps a round, in mode local. [default: 1]", rich_help_panel=QUESTION
    ),
    records: int | None = typer.Option(
        None,
        help="Of the largest client (local) or of all (distributed); delta must be below one over it.",
        rich_help_panel=QUESTION,
    ),
    clients: int | None = typer.Option(None, help="The same for mode client.", rich_help_panel=QUESTION),
    mode: str | None = typer.Option(
        None, help="local, distributed or client, as train's --privacy. [default: local]", rich_help_panel=MODE
    ),
    cohort: int | None = typer.Option(None, help="Clients of a round.", rich_help_panel=MODE),
    survivors: int | None = typer.Option(
        None, help="Fewest whose sum is opened. [default: 2/3 of the cohort]", rich_help_panel=MODE
    ),
    corrupt: int | None = typer.Option(
        None, help="Most that collude with the server. [default: a tenth of the cohort]", rich_help_panel=MODE
    ),
    parameters: int | None = typer.Option(None, help="Trained. [default: 18432]", rich_help_panel=MODE),
    ring_bits: int | None = typer.Option(None, help="[default: 32]", rich_help_panel=MODE),
    plot: Path | None = typer.Option(
        None, help="Draw epsilon against noise and rounds, .svg or .png.", rich_help_panel=OUTPUT
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON.", rich_help_panel=OUTPUT),
) -> None:
    """Say how much noise a promise needs, or what a noise promises. Trains nothing and reads no data.

    Exit codes: 0 done, 2 a setting is not acceptable, 6 the privacy cannot be given, 10 files.
    """
    console = Console(stderr=True)
    with reported(console):
        values = {
            "epsilon": epsilon,
            "noise_multiplier": noise_multiplier,
            "delta": delta,
            "rounds": rounds,
            "rate": rate,
            "local_steps": local_steps,
            "records": records,
            "clients": clients,
            "mode": mode,
            "cohort": cohort,
            "survivors": survivors,
            "corrupt": corrupt,
            "parameters": parameters,
            "ring_bits": ring_bits,
        }
        from fedpt_secure.config import build
        from fedpt_secure.report import Plan, PlanConfig, check_figure_path, plan_privacy, write_figure

        if plot is not None:
            check_figure_path(plot)
        given = {name: value for name, value in values.items() if value is not None}
        answer: Plan = plan_privacy(build(PlanConfig, given, command="account"))
        if plot is not None:
            write_figure(answer, plot)
            console.print(f"plot: {plot}", style="dim", highlight=False, soft_wrap=True)
    if json_output:
        typer.echo(json.dumps(answer.to_json(), indent=2, allow_nan=False))
        return
    shared = answer.config.mode != "local"
    table = Table(box=box.SIMPLE)
    for heading in ("epsilon", "noise multiplier", "share, clip norms", "signal/noise over local")[
        : 4 if shared else 2
    ]:
        table.add_column(heading, justify="right")
    for row in answer.rows:
        figures = [row.noise_multiplier, row.share, row.gain][: 3 if shared else 1]
        cells = ["-" if figure is None else f"{figure:.4g}" for figure in figures]
        table.add_row(f"{row.epsilon:g}", *cells, style="bold" if row.asked else "")
    out = Console()
    out.print(table)
    out.print(f"{escape(answer.statement.claim())} Accountant: {escape(answer.statement.accountant)}.", highlight=False)
