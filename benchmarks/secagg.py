"""Speed and scale of secure aggregation: against the processor, against Flower, and whole rounds.

    python benchmarks/secagg.py                       # the table; several minutes
    python benchmarks/secagg.py --quick               # under a minute
    python benchmarks/secagg.py --json > secagg.json  # the results; --from secagg.json prints and draws them again
    python benchmarks/secagg.py --markdown --plots docs/figures

Every measured sum is compared with the plain one; a wrong one ends the benchmark (exit code 1). Without flwr that part
is left out, and the table and the JSON say so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cryptography.hazmat.backends.openssl import backend
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from secagg_costs import measure_costs
from secagg_flower import FlowerCohort, check_flower, compare_with_flower, flower_is_missing, flower_version
from secagg_limits import MASKS, measure_limits, processor
from secagg_protocol import Cohort, measure_protocol
from secagg_report import Results, markdown, plot, print_table
from secagg_timing import WrongSum, count_cpu_time


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read measurements, and show them; the exit code."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if options.read:
        results = json.loads(options.read.read_text())
    else:
        try:
            results = measure(options, console)
        except WrongSum as error:
            console.print(f"error: {error}", markup=False)
            return 1
    if options.plots:
        for path in plot(results, options.plots):
            console.print(f"wrote {path}", markup=False)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.markdown:
        print(markdown(results))
    else:
        print_table(results, Console(width=max(Console().width, 120)))
    return 0


def measure(options: argparse.Namespace, console: Console) -> Results:
    """All parts, one after the other, as the JSON that the benchmark prints.

    Raises:
        WrongSum: a measured aggregation is wrong.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        threads = sorted({1, options.threads})
        task = progress.add_task("limits", total=len(threads))
        limits = []
        for number in threads:
            limits.append(measure_limits(number, options.limit_elements, options.rounds))
            progress.advance(task)

        steps = {str(size): measure_costs(size, options.rounds) for size in options.elements}

        left_out = "it was not asked for (--no-flower)" if options.no_flower else flower_is_missing()
        comparisons = []
        if left_out is None:
            check_flower()
            threshold = Cohort(options.flower_clients, 1).context.threshold
            task = progress.add_task(f"Flower's shares, n = {options.flower_clients}", total=options.flower_clients)
            flower = FlowerCohort(options.flower_clients, threshold, lambda: progress.advance(task))
            for size in options.flower_elements:
                task = progress.add_task(f"Flower, {size:,} elements", total=None)
                comparisons.append(
                    compare_with_flower(
                        flower,
                        size,
                        threads=options.threads,
                        rounds=min(options.rounds, 3),
                        advance=lambda task=task: progress.advance(task),
                    )
                )
                progress.update(task, total=progress.tasks[task].completed)

        protocol = []
        for size in options.elements:
            for clients in options.clients:
                total = 5 * clients - 3 * len(Cohort(clients, 1).dropouts)
                task = progress.add_task(f"round, n = {clients}, {size:,} elements", total=total)
                protocol.append(
                    measure_protocol(
                        clients,
                        size,
                        options.threads,
                        lambda task=task: progress.advance(task),
                        cpu_time=options.cpu_time,
                    )
                )
    return {
        # The highest over the numbers of threads; `limits` has them all.
        "fraction_of_aes_limit": max(limit.fraction_of_aes_limit for limit in limits),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": "processor time" if options.cpu_time else "wall time",
        "python": platform.python_version(),
        "cryptography": importlib.metadata.version("cryptography"),
        "openssl": backend.openssl_version_text(),
        "flower": flower_version(),
        "masks_at_a_time": MASKS,
        "limits": [asdict(limit) for limit in limits],
        "steps": steps,
        "vs_flower": [asdict(comparison) for comparison in comparisons],
        "vs_flower_left_out": left_out,
        "protocol": [asdict(cost) for cost in protocol],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the results as JSON")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the figures to DIR (needs matplotlib)")
    parser.add_argument("--from", dest="read", type=Path, metavar="FILE", help="show what --json wrote to FILE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for masks; default: all cores")
    parser.add_argument("--rounds", type=int, help="times that short measurements are repeated")
    parser.add_argument("--clients", type=_numbers, metavar="N,N", help="cohorts of the whole rounds")
    parser.add_argument("--elements", type=_numbers, metavar="D,D", help="vector lengths of the whole rounds")
    parser.add_argument("--limit-elements", type=int, metavar="D", default=10**7, help="vector length for the limit")
    parser.add_argument("--flower-clients", type=int, metavar="N", help="cohort beside Flower")
    parser.add_argument("--flower-elements", type=_numbers, metavar="D,D", help="vector lengths beside Flower")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower out")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, one thread: for busy machines")
    options = parser.parse_args(arguments)
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib (pip install 'fedpt-secure[bench]')")
    if options.cpu_time:
        options.threads = 1
        count_cpu_time()
    quick, full = (5, [16, 64], 16, [10**6]), (15, [16, 64, 256, 1000], 32, [10**6, 10**7])
    rounds, clients, flower_clients, flower_elements = quick if options.quick else full
    options.rounds = options.rounds or rounds
    options.clients = options.clients or clients
    options.elements = options.elements or [10**6]
    options.flower_clients = options.flower_clients or flower_clients
    options.flower_elements = options.flower_elements or flower_elements
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
