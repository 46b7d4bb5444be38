"""Tables and statements for people, from `summary.json`'s object and nothing else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ARMS = {
    "large_base": "large LM alone",
    "small_base": "small LM, pretrained",
    "small_tuned": "small LM, tuned",
    "proxy_tuned": "large LM, proxy-tuned",
}


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The result of a run: utility, cost, privacy."""
    evaluation, improvement = summary["evaluation"], summary["improvement"]
    table = Table(title=f"Held-out text: {evaluation['records']:,} records, {evaluation['tokens']:,} tokens")
    table.add_column("model")
    for heading in ("loss, nats/token", "95 % interval", "perplexity"):
        table.add_column(heading, justify="right")
    for name, label in ARMS.items():
        arm = summary["arms"][name]
        style = "bold" if name == "proxy_tuned" else ""
        perplexity = "inf" if arm["perplexity"] is None else f"{arm['perplexity']:.2f}"
        table.add_row(label, f"{arm['loss']:.4f}", interval(arm["ci"]), perplexity, style=style)
    console.print(table)
    low, high = improvement["ci"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    console.print(
        f"Proxy-tuned against large alone: [bold]{improvement['loss']:+.4f}[/] nats/token gained "
        f"({interval(improvement['ci'])}), {verdict}; {improvement['fraction_improved']:.1%} of records improved; "
        f"alpha {summary['alpha']:g}{_shares(summary['shares'])}.",
        highlight=False,
    )
    _print_cost(console, summary)
    _print_black_box(console, summary)
    aggregation = summary["privacy"]["aggregation"]
    console.print(f"Aggregation: {aggregation['aggregator']}; {aggregation['trust']}.", highlight=False)
    _print_privacy(console, summary)


def _shares(shares: list[list[float]]) -> str:
    """The tuned small LM's own share by place, in words."""
    if not any(share for _, share in shares):
        return ""
    return ", and the tuned small LM's own share " + ", ".join(
        f"{share:g} from token {place}" for place, share in shares
    )


def _print_black_box(console: Console, summary: dict[str, Any]) -> None:
    """What an API was sent, and how much of what it said is its own."""
    box = summary.get("black_box", {})
    if "address" not in box:
        return
    left = ", which left this machine" if box["leaves_this_machine"] else ""
    exact = f"; {box['exact_tokens']} tokens a position exact, tail: {box['tail']}" if box["exact_tokens"] else ""
    console.print(
        f"Sent to {box['address']}{left}: {box['requests']:,} requests, {box['prompt_tokens']:,} prompt tokens, "
        f"{box['bytes_sent'] / 1e6:.1f} MB out, {box['bytes_received'] / 1e6:.1f} MB back{exact}.",
        highlight=False,
        markup=False,
    )


def _print_cost(console: Console, summary: dict[str, Any]) -> None:
    training, size = summary["training"], summary["bytes"]
    aborted = f", {training['rounds_aborted']} aborted" if training["rounds_aborted"] else ""
    dropped = f", {training['dropped']} drop-outs" if training["dropped"] else ""
    console.print(
        f"{training['rounds']} rounds{aborted} of {training['cohort']} clients{dropped}; "
        f"{training['trained_parameters']:,} trained parameters; per client and round "
        f"{size['up_per_client_round'] / 1e3:.1f} kB up, {size['down_per_client_round'] / 1e3:.1f} kB down.",
        highlight=False,
    )
    top = {name: value for name, value in summary["seconds"].items() if "." not in name}
    inner = {
        name.removeprefix("rounds."): value for name, value in summary["seconds"].items() if name.startswith("rounds.")
    }
    console.print(
        "Time: "
        + ", ".join(f"{name} {value:.0f} s" for name, value in top.items())
        + " (rounds: "
        + ", ".join(f"{name} {value:.1f} s" for name, value in inner.items())
        + ").",
        highlight=False,
    )


def _print_privacy(console: Console, summary: dict[str, Any]) -> None:
    privacy = summary["privacy"]
    if not summary["private"]:
        console.print("[bold red]NOT PRIVATE: no differential privacy is promised.[/]")
        return
    console.print(f"[bold]Privacy:[/] {escape(privacy['claim'])}", highlight=False)
    console.print(f"Mechanism: {escape(privacy['mechanism'])}.", highlight=False)
    console.print(f"Accountant: {escape(privacy['accountant'])}.", highlight=False)
    for item in privacy["assumptions"]:
        console.print(f"Assumes: {escape(item)}.", highlight=False)
    for item in privacy["not_covered"]:
        console.print(f"Not covered: {escape(item)}.", highlight=False)


def interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]".replace("[", r"\[")
