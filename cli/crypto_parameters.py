"""`fedpt-secure crypto parameters`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.errors import reported
from fedpt_secure.errors import ConfigError

_HEADINGS = ("clients", "k", "t", "fewest\nleft", "corrupt", "split", "both\nkinds", "lost\nround", "kB up", "kB\ndown")

crypto = typer.Typer(
    name="crypto", help="What secure aggregation needs and costs.", no_args_is_help=True, rich_markup_mode="rich"
)


@crypto.callback()
def root() -> None:
    """Keep `parameters` a command of its own, though it is the only one."""


@crypto.command()
def parameters(
    cohort: list[int] = typer.Option(..., help="Clients of a round; give it again for another line."),
    corrupt: float = typer.Option(0.1, help="Fraction of clients in league with the server."),
    dropout: float = typer.Option(0.1, help="Fraction of clients that may vanish, or that the server calls lost."),
    security_bits: int = typer.Option(40, help="The server learns more than one sum with a chance below 2^-this."),
    correctness_bits: int = typer.Option(20, help="A round is abandoned in vain with a chance below 2^-this."),
    grinding_bits: int = typer.Option(64, help="The server tries out 2^this graphs and keeps the one it likes best."),
    elements: int = typer.Option(1_000_000, help="Elements of the vector that is summed."),
    ring_bits: int = typer.Option(32, help="Bits of an element on the wire."),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Graph degree, threshold and bytes for a cohort, and the adversary that these numbers withstand.

    Exit codes: 0 done, 2 no parameters withstand such an adversary, or an argument is not acceptable.
    """
    console = Console(stderr=True)
    with reported(console):
        rows = [
            _row(
                size,
                (corrupt, dropout),
                bits={"security": security_bits, "correctness": correctness_bits, "grinding": grinding_bits},
                vector=(elements, ring_bits),
            )
            for size in cohort
        ]
    if json_output:
        typer.echo(json.dumps(rows, indent=2, allow_nan=False))
    else:
        _print(Console(), rows, elements, ring_bits)


def _row(
    cohort: int, fractions: tuple[float, float], *, bits: dict[str, int], vector: tuple[int, int]
) -> dict[str, Any]:
    from fedpt_secure.crypto import (
        CryptoError,
        client_bytes,
        failure_probabilities,
        secure_aggregation_parameters,
    )

    try:
        chosen = secure_aggregation_parameters(
            cohort,
            *fractions,
            security_bits=bits["security"],
            correctness_bits=bits["correctness"],
            grinding_bits=bits["grinding"],
        )
        dropouts = cohort - chosen.minimum_survivors
        failure = failure_probabilities(chosen, dropouts=dropouts, grinding_bits=bits["grinding"])
        size = client_bytes(chosen, elements=vector[0], ring_bits=vector[1])
    except CryptoError as error:
        raise ConfigError(error.message, hint=error.hint) from error
    return {
        **asdict(chosen),
        "dropouts": dropouts,
        "asked": {f"{name}_bits": value for name, value in bits.items()},
        "failure": asdict(failure),
        "bytes": {"elements": vector[0], "ring_bits": vector[1], "up": size.total_up, "down": size.total_down}
        | {"up_by_phase": size.up, "down_by_phase": size.down},
    }


def _print(console: Console, rows: list[dict[str, Any]], elements: int, ring_bits: int) -> None:
    # Ten columns fit into 80 characters without lines between them.
    table = Table(
        title=f"Secure aggregation of {elements:,} elements of {ring_bits} bits",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        failure, size = row["failure"], row["bytes"]
        table.add_row(
            f"{row['cohort']:,}",
            "all" if row["degree"] is None else str(row["degree"]),
            *(str(row[name]) for name in ("threshold", "minimum_survivors", "tolerated_corrupt_clients")),
            *(_power(failure[name]) for name in ("split_log2", "neighbourhood_log2", "lost_round_log2")),
            *(f"{size[way] / 1e3:,.0f}" for way in ("up", "down")),
        )
    console.print(table)
    for row in rows:
        console.print(f"{row['cohort']:,} clients, against {escape(row['adversary'])}.", highlight=False)
    console.print(
        "k: neighbours of a client. t: shares that rebuild a secret. fewest left: vectors in a sum. The server picks "
        "whom to call lost when it knows the graph; over all its tries, the chance that it sees more than one sum "
        "(split) and that one client's share holders give up both kinds of shares (both kinds). lost round: the chance "
        "that a round is abandoned in vain, which reveals nothing. never: as long as no more clients are corrupt or "
        "lost than stated. kB: one client's, in a round without dropouts.",
        highlight=False,
        style="dim",
    )


def _power(exponent: float | None) -> str:
    return "never" if exponent is None else f"2^{exponent:.1f}"
