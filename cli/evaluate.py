"""`fedpt-secure evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.evaluation_tables import print_evaluation
from fedpt_secure.cli.privacy_warning import warn_if_not_private
from fedpt_secure.cli.progress import shown_on


def evaluate(
    run: Path = typer.Option(..., help="Directory of a finished run."),
    records: int | None = typer.Option(None, help="Held-out records to score. [default: the run's own sample]"),
    ceiling: bool = typer.Option(
        False,
        "--ceiling",
        help="Tune the large model directly too, on all clients' text, [red]without privacy[/]: the yardstick for the "
        "share of the gap closed. Trained once, resumable, kept in the cache.",
    ),
    ceiling_records: int | None = typer.Option(None, help="Training records of the ceiling. [default: all]"),
    ceiling_epochs: int | None = typer.Option(None, help="[default: 1]"),
    responses: int | None = typer.Option(
        None, help="Held-out prompts that every arm responds to; 0 for none. [default: 20, where there are prompts]"
    ),
    max_new_tokens: int | None = typer.Option(None, help="Of a response. [default: 64]"),
    json_output: bool = typer.Option(False, "--json", help="Print evaluation.json on standard output."),
) -> None:
    """Judge a finished run on held-out text: the arms side by side, with intervals.

    The arms: the large LM alone, the small LM before and after tuning, the large LM proxy-tuned, and with --ceiling the
    large LM tuned directly. Data with prompts gets ROUGE-L and exact match of greedy responses as well. Held-out text
    chooses nothing.

    Exit codes: 0 done, 2 settings, 4 data, 5 models, 8 run directory, 9 black box, 10 files, 130 interrupted.
    """
    console = Console(stderr=True)
    with reported(console):
        values = {
            "records": records,
            "ceiling": ceiling,
            "ceiling_records": ceiling_records,
            "ceiling_epochs": ceiling_epochs,
            "responses": responses,
            "max_new_tokens": max_new_tokens,
        }
        from fedpt_secure.cli.quiet import quiet_libraries
        from fedpt_secure.config import build
        from fedpt_secure.data import Cache
        from fedpt_secure.errors import ConfigError
        from fedpt_secure.federation import RunDirectory
        from fedpt_secure.report import EvaluateConfig, evaluate_run

        asked = build(EvaluateConfig, {k: v for k, v in values.items() if v is not None}, command="evaluate")
        if not ceiling and (ceiling_records is not None or ceiling_epochs is not None):
            raise ConfigError("--ceiling-records and --ceiling-epochs go with --ceiling", hint="add --ceiling")
        quiet_libraries()
        directory = RunDirectory.open(run)
        warn_if_not_private(directory.config(), console)
        with shown_on(console) as progress:
            result = evaluate_run(directory, asked, cache=Cache(), progress=progress)
    if json_output:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_evaluation(Console(), result)
