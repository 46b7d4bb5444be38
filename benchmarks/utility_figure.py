"""Draw docs/figures/utility_gap.svg: the gap closed against epsilon, and against the time of a run.

    python benchmarks/utility_figure.py --runs docs/figures/utility_gap.jsonl --output docs/figures

The file holds one object a line with a `panel`: `curve` for what `utility_study.py curve` appends; `run` and `time` for
what `utility.py --json` prints, `time` with the `line` that it belongs to.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("svg")
import matplotlib.pyplot as plt

BARS = {
    ("chat", "medquad"): {"4.0": 0.35, "8.0": 0.45, "inf": 0.60},
    ("dolly",): {"4.0": 0.25, "8.0": 0.35, "inf": 0.50},
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    simulated = [run for run in runs if run["panel"] == "curve"]
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(run["data"] for run in simulated))}
    _simulated(left, simulated, colours)
    for data, bars in BARS.items():
        for epsilon, bar in bars.items():
            place = _place({"epsilon": epsilon}) * (0.93 if len(data) > 1 else 1.07)
            left.plot(place, bar, marker="_", markersize=12, color="black" if len(data) > 1 else "grey")
    made = [run for run in runs if run["panel"] == "run"]
    _points(left, made, _place, [colours[run["data"]] for run in made])
    left.annotate("bars: chat, medquad (black), dolly (grey)", (1.3, 0.115), fontsize=8)
    left.set_xscale("log", base=2)
    ticks = sorted({_place(run) for run in simulated})
    left.set_xticks(ticks, ["inf" if tick == INFINITE else f"{tick:g}" for tick in ticks])
    left.set_xlabel("epsilon; lines simulated (three seeds), points by the product's own path")
    left.set_ylabel("fraction of the gap closed")
    timed = [run for run in runs if run["panel"] == "time"]
    for index, name in enumerate(dict.fromkeys(run["line"] for run in timed)):
        points = sorted((run for run in timed if run["line"] == name), key=_minutes)
        _points(right, points, _minutes, [f"C{index}"] * len(points))
        right.plot([_minutes(run) for run in points], [run["gap_closed"] for run in points], label=name)
    right.set_xlabel("CPU minutes of the run, evaluation included")
    for axes, corner in ((left, "upper left"), (right, "lower left")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=corner)
    figure.suptitle("Ceilings on all records; intervals: 95 % over held-out records", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.output / "utility_gap.svg", metadata={"Date": None})


def _place(run: Mapping[str, Any]) -> float:
    epsilon = float(run["epsilon"])
    return INFINITE if math.isinf(epsilon) else epsilon


def _minutes(run: Mapping[str, Any]) -> float:
    return float(run["minutes"])


def _simulated(axes: Axes, runs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Mean over seeds, and their range."""
    for name, colour in colours.items():
        at: dict[float, list[float]] = {}
        for run in runs:
            if run["data"] == name:
                at.setdefault(_place(run), []).append(run["gap_closed"])
        places = sorted(at)
        axes.plot(places, [mean(at[place]) for place in places], color=colour, label=name)
        axes.fill_between(
            places,
            [min(at[place]) for place in places],
            [max(at[place]) for place in places],
            color=colour,
            alpha=0.25,
            linewidth=0,
        )


def _points(axes: Axes, runs: Sequence[Mapping[str, Any]], place: Any, colours: Sequence[str]) -> None:
    for run, colour in zip(runs, colours, strict=True):
        value, (low, high) = run["gap_closed"], run["ci"]
        axes.errorbar(
            place(run), value, yerr=[[value - low], [high - value]], marker="o", markersize=4, capsize=2, color=colour
        )


if __name__ == "__main__":
    main()
