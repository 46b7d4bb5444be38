"""The overhead benchmark's results as tables, Markdown and a figure. Input is the JSON that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
Row = list[str]

ROUND_HEADINGS = ["one client's round", "trained", "operations", "seconds", "process", "of it private", "up", "down"]
RUN_HEADINGS = ["whole run, one seat of the cohort", "rounds", "operations", "seconds", "up", "down"]
PROJECTED_HEADINGS = ["PROJECTED: pair", "way", "trained", "operations", "least memory", "up"]


def round_rows(results: Results) -> list[Row]:
    """Per client and round: measured, bytes computed."""
    rows = []
    for arm in results["arms"]:
        cost = arm["client_round"]
        private = "-" if cost["private_bytes"] is None else size(cost["private_bytes"])
        rows.append(
            [
                arm["label"],
                f"{arm['trained_parameters']:,}",
                operations(cost["flops"]),
                f"{cost['seconds']:.1f}",
                size(cost["process_bytes"]),
                private,
                size(cost["bytes_up"]),
                size(cost["bytes_down"]),
            ]
        )
    return rows


def run_rows(results: Results) -> list[Row]:
    """For the whole run."""
    rows = []
    for arm in results["arms"]:
        cost = arm["whole_run"]
        figures = [
            operations(cost["flops"]),
            f"{cost['seconds']:.0f}",
            size(cost["bytes_up"]),
            size(cost["bytes_down"]),
        ]
        rows.append([arm["label"], str(cost["rounds"]), *figures])
    return rows


def projected_rows(results: Results) -> list[Row]:
    """Published pairs, computed."""
    return [
        [
            row["pair"],
            row["way"],
            f"{row['trained_parameters'] / 1e6:,.1f} M",
            operations(row["flops"]),
            size(row["least_memory_bytes"]),
            size(row["bytes_up"]),
        ]
        for row in results["projections"]
    ]


def print_tables(results: Results) -> None:
    """For a terminal."""
    console = Console()
    for headings, rows in _tables(results):
        table = Table(*headings, box=box.SIMPLE)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(results: Results) -> str:
    """For a document."""
    parts = []
    for headings, rows in _tables(results):
        lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
        parts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(parts)


def write_plot(results: Results, path: Path) -> None:
    """Bars on a logarithmic axis: operations, memory and bytes of one client's round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = results["arms"]
    panels = (
        ("operations", [arm["client_round"]["flops"] for arm in arms]),
        ("peak memory of the process, bytes", [arm["client_round"]["process_bytes"] for arm in arms]),
        ("bytes up and down", [arm["client_round"]["bytes_up"] + arm["client_round"]["bytes_down"] for arm in arms]),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3), sharey=True)
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.barh([arm["label"] for arm in arms], values, color=["#2a7f62", "#2a7f62", "#888888", "#888888"])
        axis.set_xscale("log")
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
    axes[0].invert_yaxis()
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle("One client's round (log scale); bytes are computed, the rest is measured", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _tables(results: Results) -> list[tuple[list[str], list[Row]]]:
    return [
        (ROUND_HEADINGS, round_rows(results)),
        (RUN_HEADINGS, run_rows(results)),
        (PROJECTED_HEADINGS, projected_rows(results)),
    ]


def operations(count: float) -> str:
    """Floating-point operations in a unit of three digits."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}FLOP"
    return f"{count:.3g} FLOP"


def size(count: float) -> str:
    """Bytes in a unit of three digits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
