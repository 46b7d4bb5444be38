"""Draw docs/figures/utility_chat.svg from the results of `utility_research.py`.

python tools/utility_research_figure.py --results docs/figures/utility_results.jsonl --output docs/figures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ARMS = (
    ("c-last", "last down_proj, no noise", "tab:blue", "-"),
    ("c-last-e4", "last down_proj, epsilon 4", "tab:blue", "--"),
    ("c-all", "all matrices, no noise", "tab:orange", "-"),
    ("c-all-e4", "all matrices, epsilon 4", "tab:orange", "--"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    tuned = {line["name"]: line["choice"] for line in lines if line["kind"] == "tune"}
    mixed = {
        line["settings"]["adapter"]: line["losses"]
        for line in lines
        if line["kind"] == "decode" and line["settings"].get("mixtures")
    }
    plt.rcParams["svg.hashsalt"] = "fedpt"
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, label, colour, style in ARMS:
        if name not in tuned:
            continue
        curve = {0.0: tuned[name]["large_base"]} | {float(a): v for a, v in tuned[name].items() if a[0].isdigit()}
        axes.plot(list(curve), list(curve.values()), style, color=colour, marker="o", markersize=3, label=label)
        if name in mixed:
            best = min(v for rule, v in mixed[name].items() if "mixture" in rule or "blend" in rule)
            axes.axhline(best, color=colour, linestyle=style, linewidth=0.7)
    ceilings = [
        point
        for line in lines
        if line["kind"] == "ceiling" and line["settings"]["task"] == "chat" and not line["settings"].get("layers")
        for point in line["curve"]
    ]
    for records, loss, _seconds in ceilings:
        axes.axhline(loss, color="black", linewidth=0.5)
        axes.annotate(f"large tuned directly, {records} records", (0.0, loss), fontsize=7, va="bottom")
    axes.set_xlabel("alpha")
    axes.set_ylabel("nats per token, chat choice slice")
    axes.set_ylim(3.35, 4.2)
    axes.set_title("Thin level lines: the best mixture or blend of the same adapter", fontsize=8)
    axes.legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(options.output / "utility_chat.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
