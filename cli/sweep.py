"""`fedpt-secure sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.config import build, overlay, read_settings
from fedpt_secure.errors import ConfigError

_Number = TypeVar("_Number", int, float)


def sweep(
    epsilon: str = typer.Option("1,2,4,8,inf", help="Promises, separated by commas; inf trains without privacy."),
    seeds: int = typer.Option(1, help="Runs per combination, each with a seed of its own."),
    mode: str = typer.Option(
        "", help="Of local, distributed, client, separated by commas. [default: the settings' one]"
    ),
    cohort: str = typer.Option("", help="Clients per round, separated by commas."),
    clients: str = typer.Option("", help="To how many clients records are dealt, separated by commas."),
    alpha: str = typer.Option("", help="Weights of the small LM's shift, separated by commas."),
    data: str | None = typer.Option(None, help="As for `train`."),
    rounds: int | None = typer.Option(None, help="As for `train`."),
    evaluation_records: int | None = typer.Option(None, help="As for `train`."),
    config: Path | None = typer.Option(None, help="TOML file with any settings of `train`, shared by all cells."),
    out: Path = typer.Option(..., help="Directory of the sweep; an interrupted one in it goes on."),
    json_output: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Run a grid of trainings and write one table of results. Finished cells are never run again.

    Every cell is a run with a promise of its own: the same records in several cells cost their owners the sum.

    Exit codes: 0 done (refused cells are in the table), 2 settings, 4 data, 5 models, 8 directory, 9 black box,
    10 files, 130 interrupted.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.cli.quiet import quiet_libraries
        from fedpt_secure.data import Cache
        from fedpt_secure.report import SweepGrid, run_sweep

        grid = build(
            SweepGrid,
            {
                "epsilons": _numbers("epsilon", epsilon, float),
                "modes": tuple(part.strip() for part in mode.split(",") if part.strip()),
                "seeds": seeds,
                "cohorts": _numbers("cohort", cohort, int),
                "clients": _numbers("clients", clients, int),
                "alphas": _numbers("alpha", alpha, float),
            },
            command="sweep",
        )
        given: dict[str, Any] = {}
        for group, key, value in (
            ("data", "source", data),
            ("federation", "rounds", rounds),
            ("evaluation", "records", evaluation_records),
        ):
            if value is not None:
                given[group] = {key: value}
        shared = overlay(read_settings(config) if config is not None else {}, given)
        quiet_libraries()
        console.print(
            "[bold]note:[/] each cell has a promise of its own; the same records in several cells cost the sum",
            highlight=False,
            soft_wrap=True,
        )
        with shown_on(console) as progress:
            result = run_sweep(grid, shared, out, cache=Cache(), progress=progress)
        console.print(str(result.table), style="dim", highlight=False, soft_wrap=True)
    if json_output:
        outcome = {"finished": list(result.finished), "refused": dict(result.refused), "table": str(result.table)}
        typer.echo(json.dumps(outcome, indent=2))
    else:
        typer.echo(f"{len(result.finished)} cells finished, {len(result.refused)} refused; `fedpt-secure report {out}`")


def _numbers(name: str, given: str, kind: type[_Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"--{name} is {given!r}; it must be numbers separated by commas", hint=f"--{name} 1,2,4"
        ) from None
