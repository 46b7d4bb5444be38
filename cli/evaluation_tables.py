"""`evaluation.json` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpt_secure.cli.tables import ARMS, interval

_ARMS = {**ARMS, "large_tuned": "large LM, tuned directly (NOT private)"}
_METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "number_match": "final number"}


def print_evaluation(console: Console, result: dict[str, Any]) -> None:
    """Arms, the share of the gap, responses, and what may not be made of them."""
    _print_losses(console, result)
    if result["responses"] is not None:
        _print_responses(console, result["responses"])
    label = "Privacy of the run" if result["private"] else "[bold red]NOT PRIVATE[/]"
    console.print(f"{label}: {escape(result['privacy']['claim'])}", highlight=False)
    console.print(escape(result["statement"]), style="dim", highlight=False)


def _print_losses(console: Console, result: dict[str, Any]) -> None:
    evaluation, improvement = result["evaluation"], result["improvement"]
    table = Table(title=f"Held-out text: {evaluation['records']:,} records, {evaluation['tokens']:,} tokens")
    table.add_column("model")
    for heading in ("loss, nats/token", "95 % interval", "perplexity"):
        table.add_column(heading, justify="right")
    for name, label in _ARMS.items():
        if (arm := result["arms"].get(name)) is not None:
            perplexity = "inf" if arm["perplexity"] is None else f"{arm['perplexity']:.2f}"
            style = "bold" if name == "proxy_tuned" else ""
            table.add_row(label, f"{arm['loss']:.4f}", interval(arm["ci"]), perplexity, style=style)
    console.print(table)
    console.print(
        f"Proxy-tuned against large alone: [bold]{improvement['loss']:+.4f}[/] nats/token gained "
        f"({interval(improvement['ci'])}).",
        highlight=False,
    )
    if "ceiling" not in result:
        return
    ceiling, closed = result["ceiling"], result["gap_closed"]
    console.print(
        "Gap to the directly tuned model: "
        + (
            "not known to be there, so no share of it is stated"
            if closed is None
            else f"[bold]{closed['value']:.1%}[/] closed ({interval(closed['ci'])})"
        )
        + f"; the ceiling learned from {ceiling['records']:,} records, {ceiling['epochs']} epochs.",
        highlight=False,
    )


def _print_responses(console: Console, responses: dict[str, Any]) -> None:
    table = Table(
        title=f"Greedy responses to {responses['records']:,} held-out prompts, "
        f"at most {responses['max_new_tokens']} tokens each"
    )
    table.add_column("model")
    metrics = list(next(iter(responses["arms"].values())))
    for metric in metrics:
        table.add_column(_METRICS[metric], justify="right")
        table.add_column("95 % interval", justify="right")
    for name, scores in responses["arms"].items():
        cells = [cell for m in metrics for cell in (f"{scores[m]['value']:.3f}", interval(scores[m]["ci"]))]
        table.add_row(_ARMS[name], *cells, style="bold" if name == "proxy_tuned" else "")
    console.print(table)
