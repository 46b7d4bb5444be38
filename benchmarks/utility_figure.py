"""Draw docs/figures/utility_gap.svg: the gap closed against epsilon, and against the time of a run.

    python benchmarks/utility_figure.py --runs docs/figures/utility_gap.jsonl --output docs/figures

The file holds what `utility.py --json` prints, one object a line, each with a `line` (the curve it belongs to) and a
`panel`: `epsilon` or `time`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("svg")
import matplotlib.pyplot as plt

BARS = {
    "chat": {"4.0": 0.35, "8.0": 0.45, "inf": 0.60},
    "dolly": {"4.0": 0.25, "8.0": 0.35, "inf": 0.50},
}
INFINITE = 32.0
"""Where epsilon inf stands on the axis."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs = [json.loads(line) for line in options.runs.read_text(encoding="utf-8").splitlines()]
    plt.rcParams["svg.hashsalt"] = "fedpt"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True)
    epsilons = [run for run in runs if run["panel"] == "epsilon"]
    _curves(left, epsilons, _place)
    for epsilon, bar in BARS["chat"].items():
        left.plot(_place({"epsilon": epsilon}), bar, marker="_", markersize=16, color="black")
    for epsilon, bar in BARS["dolly"].items():
        left.plot(_place({"epsilon": epsilon}), bar, marker="_", markersize=16, color="grey")
    left.annotate("bars: chat, medquad (black), dolly (grey)", (4.2, 0.61), fontsize=8)
    left.set_xscale("log", base=2)
    ticks = sorted({_place(run) for run in epsilons})
    left.set_xticks(ticks, ["inf" if tick == INFINITE else f"{tick:g}" for tick in ticks])
    left.set_xlabel("epsilon")
    left.set_ylabel("fraction of the gap closed")
    _curves(right, [run for run in runs if run["panel"] == "time"], lambda run: float(run["minutes"]))
    right.set_xlabel("CPU minutes of the run, evaluation included")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle("Seed 0, ceilings on all records, 95 % intervals over held-out records", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.output / "utility_gap.svg", metadata={"Date": None})


def _place(run: Mapping[str, Any]) -> float:
    epsilon = float(run["epsilon"])
    return INFINITE if math.isinf(epsilon) else epsilon


def _curves(axes: Axes, runs: Sequence[Mapping[str, Any]], place: Any) -> None:
    for name in dict.fromkeys(run["line"] for run in runs):
        points = sorted((run for run in runs if run["line"] == name), key=place)
        values = [run["gap_closed"] for run in points]
        below = [run["gap_closed"] - run["ci"][0] for run in points]
        above = [run["ci"][1] - run["gap_closed"] for run in points]
        places = [place(run) for run in points]
        axes.errorbar(places, values, yerr=[below, above], marker="o", markersize=4, capsize=2, label=name)


if __name__ == "__main__":
    main()
