"""`fedpt-secure plan`."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.markup import escape

from fedpt_secure.cli.errors import reported

DEVICE, PRIVACY, OUTPUT = "The device", "What is promised", "Output"


def plan(
    memory: str = typer.Option(..., help="That the client's process may use: 512MB, 1.5GiB.", rich_help_panel=DEVICE),
    bandwidth: str = typer.Option(..., help="Up and down together: 10MB/day, 64kB/h.", rich_help_panel=DEVICE),
    records: int | None = typer.Option(
        None, help="Of the device, for the time of a round. [default: 32]", rich_help_panel=DEVICE
    ),
    epsilon: float | None = typer.Option(None, help="inf for no privacy. [default: 4]", rich_help_panel=PRIVACY),
    delta: float | None = typer.Option(None, help="[default: 1e-05]", rich_help_panel=PRIVACY),
    participations: int | None = typer.Option(
        None, help="Rounds that the device takes part in. [default: 1]", rich_help_panel=PRIVACY
    ),
    cohort: int | None = typer.Option(None, help="Clients of a round. [default: 26]", rich_help_panel=PRIVACY),
    json_output: bool = typer.Option(False, "--json", help="Print the plan as JSON.", rich_help_panel=OUTPUT),
) -> None:
    """Say which configuration of the built-in proxy fits a device, with the reasons, from measured costs.

    Trains nothing and reads no data. How much noise a promise takes in the other modes: `fedpt-secure account`.

    Exit codes: 0 done, 2 a setting is not acceptable or nothing fits, 6 the privacy cannot be given.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.config import build
        from fedpt_secure.report import DeviceCosts, DevicePlanConfig, parse_bytes, parse_rate, plan_device

        values = {
            "memory_bytes": parse_bytes(memory),
            "bytes_per_day": parse_rate(bandwidth).bytes_per_day,
            "records": records,
            "epsilon": epsilon,
            "delta": delta,
            "participations": participations,
            "cohort": cohort,
        }
        given = {name: value for name, value in values.items() if value is not None}
        answer = plan_device(build(DevicePlanConfig, given, command="plan"), DeviceCosts.load())
    if json_output:
        typer.echo(json.dumps(answer.to_json(), indent=2, allow_nan=False))
        return
    out = Console()
    out.print(f"[bold]{escape(answer.command)}[/]", highlight=False, soft_wrap=True)
    without_option = [
        f"{section}.{name} = {json.dumps(value)}"
        for section, values in answer.settings.items()
        if section != "lora"
        for name, value in values.items()
    ]
    if without_option:
        out.print(f"with --config FILE, in it: {', '.join(without_option)}", highlight=False)
    for reason in answer.reasons:
        out.print(f"- {escape(reason)}.", highlight=False)
    out.print(f"Measured by: {escape(answer.measured['command'])}", style="dim", highlight=False)
