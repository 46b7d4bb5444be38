"""The benchmark's results as one table, as Markdown, and as figures. Input is the JSON that the benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
Row = tuple[str, str, str, str]

HEADINGS: Row = ("what", "ours", "beside it", "ratio")
GENERATOR_NOTE = (
    "Flower's masks come from NumPy's Mersenne Twister, seeded with 32 bits: not a cryptographic generator. "
    "Ours are AES-256."
)


def rows(results: Results) -> list[Row]:
    """All measurements, a line each: what was measured, our figure, what stands beside it, and the ratio of the two."""
    table: list[Row] = []
    for limits in results["limits"]:
        threads, size = _threads(limits["threads"]), _count(limits["elements"])
        roof = min(limits["aes_gbps"], results["masks_at_a_time"] * limits["memory_gbps"])
        table += [
            (
                f"{results['masks_at_a_time']} masks expanded and added, {size} uint32, {threads}",
                f"{limits['masks_gbps']:.1f} GB/s",
                f"limit {roof:.1f} GB/s: AES-256 keystream {limits['aes_gbps']:.1f} (plain counter mode "
                f"{limits['counter_mode_gbps']:.1f}), memory {limits['memory_gbps']:.1f} a pass",
                f"{limits['masks_gbps'] / roof:.2f} of the limit",
            ),
            (
                f"one mask alone, {size} uint32, one thread of {limits['threads']}",
                f"{limits['one_mask_gbps']:.1f} GB/s",
                f"memory {limits['memory_gbps']:.1f} GB/s, which the vector passes for it alone",
                f"{limits['one_mask_gbps'] / limits['aes_gbps']:.2f} of the keystream",
            ),
        ]
    for flower in results["vs_flower"]:
        what = f"n = {flower['n']}, {_count(flower['elements'])} elements"
        table += [
            (
                f"client's masks, {what}, up to {_threads(flower['threads'])}",
                _seconds(flower["client_seconds"]),
                f"Flower {_seconds(flower['flower_client_seconds'])}",
                f"{flower['client_ratio']:.0f}x (one thread {flower['client_ratio_one_thread']:.0f}x, "
                f"whole step {flower['client_step_ratio']:.0f}x)",
            ),
            (
                f"server's unmasking, {what}, {flower['dropouts']} lost, {_threads(flower['threads'])}",
                _seconds(flower["server_seconds"]),
                f"Flower {_seconds(flower['flower_server_seconds'])}",
                f"{flower['server_ratio']:.0f}x",
            ),
        ]
    if results["vs_flower_left_out"]:
        table.append(("Flower", "", f"left out: {results['vs_flower_left_out']}", ""))
    for cost in results["protocol"]:
        what = f"n = {cost['n']} ({_graph(cost)}, t = {cost['threshold']}), {_count(cost['elements'])} elements"
        vectors = cost["n"] * cost["elements"] * 4 / 1e6
        peak = cost["server_peak_mb"]
        table += [
            (
                f"a client's round, {what}, one thread",
                _seconds(cost["client_seconds"]),
                f"sends {cost['client_bytes'] / 1e6:.3f} MB, receives {cost['client_bytes_received'] / 1e3:.0f} kB",
                f"{cost['client_bytes'] / (cost['elements'] * 4):.3f} of the plain vector",
            ),
            (
                f"the server's round, n = {cost['n']}, {cost['dropouts']} lost, {_threads(results['threads'])}",
                _seconds(cost["server_seconds"]),
                f"of it unmasking {_seconds(cost['unmask_seconds'])}; "
                + ("peak memory not known here" if peak is None else f"peak memory {peak:.0f} MB"),
                "" if peak is None else f"{peak / vectors:.3f} of all vectors",
            ),
        ]
    for elements, costs in results["steps"].items():
        others = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in costs.items() if name != "one mask")
        extra = sum(costs[name] for name in ("rounding", "packing", "hashing"))
        table.append(
            (
                f"one mask, {_count(int(elements))} elements, one thread",
                _seconds(costs["one mask"]),
                others,
                f"rounding, packing and hashing cost {extra / costs['one mask']:.0f} masks",
            )
        )
    return table


def print_table(results: Results, console: Console) -> None:
    """The table for a terminal."""
    table = Table(title=_title(results), caption="\n".join(_notes(results)), box=box.SIMPLE, caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)


def markdown(results: Results) -> str:
    """The table for a document."""
    lines = [f"{_title(results)}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows(results))]
    return "\n".join([*lines, "", *(f"{note}  " for note in _notes(results))]).rstrip()


def plot(results: Results, directory: Path) -> list[Path]:
    """Two figures: what a client pays against the number of clients, and where its time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    costs = results["protocol"]
    elements = _count(costs[0]["elements"])
    sizes = [cost["n"] for cost in costs]

    figure, axes = pyplot.subplots(figsize=(7, 4))
    masking = [cost["phase_seconds"]["mask"] * 1e3 for cost in costs]
    keys = [sum(cost["phase_seconds"][phase] for phase in ("share", "unmask")) * 1e3 for cost in costs]
    axes.plot(sizes, [cost["client_seconds"] * 1e3 for cost in costs], "o-", label="whole round")
    axes.plot(sizes, masking, "s--", label="masking: grows with the degree, as log n once the graph is sparse")
    axes.plot(sizes, keys, "^--", label="shares, and everybody's signatures: grows as n")
    for size, cost, height in zip(sizes, costs, masking, strict=True):
        axes.annotate(f"k = {cost['degree']}", (size, height), textcoords="offset points", xytext=(4, -12), fontsize=8)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("clients n (logarithmic)")
    axes.set_ylabel("one client's time, ms")
    axes.set_title(f"A client's cost, {elements} elements, one thread")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    against_log_n = directory / "secagg_client_cost.png"

    other, bars = pyplot.subplots(figsize=(7, 4))
    step = results["steps"].get(str(costs[0]["elements"]))
    parts = [_parts(cost, step) for cost in costs]
    places, bottoms = range(len(costs)), [0.0] * len(costs)
    for name in parts[0]:
        heights = [part[name] * 1e3 for part in parts]
        bars.bar(places, heights, bottom=bottoms, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    bars.set_xticks(places, [f"n = {size}" for size in sizes])
    bars.set_ylabel("one client's time, ms")
    bars.set_title(f"Where a client's time goes, {elements} elements, one thread")
    bars.legend(fontsize=8)
    by_part = directory / "secagg_where_time_goes.png"

    for drawn, path in ((figure, against_log_n), (other, by_part)):
        drawn.tight_layout()
        drawn.savefig(path, dpi=150, metadata={"Software": None})
        pyplot.close(drawn)
    return [against_log_n, by_part]


def _parts(cost: Results, step: dict[str, float] | None) -> dict[str, float]:
    """Seconds of a client's round by part; the masking phase is divided by the steps' own measurements."""
    phases = cost["phase_seconds"]
    parts = {
        "checking advertisements, sealing shares": phases["advertise"] + phases["share"],
        "checking confirmations, releasing shares": phases["confirm"] + phases["unmask"],
        "rounding": phases["encode"],
    }
    if step is None:
        return parts | {"masking phase": phases["mask"]}
    masks = min((cost["degree"] + 1) * step["one mask"], phases["mask"])
    hashing = min(step["hashing"] + step["packing"], phases["mask"] - masks)
    rest = phases["mask"] - masks - hashing
    return parts | {"masks": masks, "packing, hashing": hashing, "opening shares, key agreement, copies": rest}


def _title(results: Results) -> str:
    return (
        f"{results['processor']}, {results['cores']} cores, up to {_threads(results['threads'])}; "
        f"Python {results['python']}, cryptography {results['cryptography']}, {results['openssl']}"
    )


def _notes(results: Results) -> Sequence[str]:
    notes = [
        f"Best of several runs by {results['clock']}, taken in turn in one process run; "
        "GB/s are 10^9 bytes of masks a second."
    ]
    if results["vs_flower"]:
        notes.append(f"Flower is flwr {results['flower']}, its own functions. {GENERATOR_NOTE}")
    if results["protocol"]:
        notes.append("Whole rounds are run once; a client's time is the mean over all clients.")
    return notes


def _graph(cost: Results) -> str:
    return "complete" if cost["degree"] == cost["n"] - 1 else f"k = {cost['degree']}"


def _threads(number: int) -> str:
    return f"{number} thread" if number == 1 else f"{number} threads"


def _count(elements: int) -> str:
    exponent = len(str(elements)) - 1
    return f"10^{exponent}" if elements == 10**exponent and exponent > 3 else f"{elements:,}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{1 if seconds >= 1e-2 else 2}f} ms"
