"""Pairwise masks against CKKS: the same vectors, in time, bytes, precision and trust.

    pip install -e '.[bench,ckks]'
    python benchmarks/aggregators.py                        # the table; some minutes
    python benchmarks/aggregators.py --quick                # under a minute
    python benchmarks/aggregators.py --json > results.json  # --from results.json prints and draws them again
    python benchmarks/aggregators.py --markdown --plots docs/figures

Whole rounds in one process, one client after the other, every message as it would travel. Times are processor time of
one thread, so that other work on the machine does not count. A sum that is off by more than its stated bound ends the
benchmark (exit code 1). docs/ckks.md discusses the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedpt_secure.crypto import (
    CkksClient,
    CkksParameters,
    CkksServer,
    CkksUnavailable,
    ClientPolicy,
    FixedPointEncoding,
    Identity,
    ParameterError,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    default_threshold,
)

BOUND = 1.0
RING_BITS = 32
MASK_TRUST = "server may be malicious; fewer than n/3 clients collude"
CKKS_TRUST = "server honest but curious; no client colludes with it"
CKKS_SETS: tuple[tuple[int, tuple[int, ...], int], ...] = (
    (4096, (60, 20), 16),
    (4096, (60, 20), 24),
    (4096, (46, 46, 17), 24),
    (8192, (60, 40, 40, 60), 24),
)
"""Degree, prime sizes, flooding bits: the default with less and with its own flooding, a modulus as long as degree 4096
allows, and the preset of TenSEAL's tutorials."""


class WrongSum(RuntimeError):
    """A measured sum is off by more than its bound: its times mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One round of one method.

    Attributes:
        method, trust: in words.
        n, elements: clients and coordinates, in [-1, 1].
        client_seconds: one client's processor time in all phases, encoding included; the mean over clients.
        server_seconds: the server's, in all calls.
        client_bytes_up, client_bytes_down: of one client that is not the dealer.
        dealer_bytes_up: what the client that deals the CKKS key sends; None where there is no dealer.
        largest_error: of any coordinate of the sum, measured; `error_bound`: what is promised.
        phase_seconds: client_seconds by phase.
    """

    method: str
    trust: str
    n: int
    elements: int
    client_seconds: float
    server_seconds: float
    client_bytes_up: int
    client_bytes_down: int
    dealer_bytes_up: int | None
    largest_error: float
    error_bound: float
    phase_seconds: dict[str, float]


@dataclass
class Meter:
    """Processor seconds and bytes of one round."""

    clients: dict[str, float] = field(default_factory=dict)
    server: float = 0.0
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def client(self, phase: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.clients[phase] = self.clients.get(phase, 0.0) + time.process_time() - began

    def serve(self, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        result = work(*arguments)
        self.server += time.process_time() - began
        return result

    def count(self, counter: dict[str, int], name: str, message: bytes) -> bytes:
        counter[name] = counter.get(name, 0) + len(message)
        return message


class Cohort:
    """Identities, context and vectors that every method is measured with."""

    def __init__(self, n: int, elements: int) -> None:
        names = [f"client-{number:04d}" for number in range(n)]
        self.identities = {name: Identity.generate() for name in names}
        self.roster = Roster({name: identity.verify_key_bytes for name, identity in self.identities.items()})
        threshold = default_threshold(n)
        self.context = RoundContext(
            run_id=os.urandom(16),
            round_index=0,
            cohort=tuple(names),
            roster_digest=self.roster.digest,
            model_digest=bytes(32),
            vector_length=elements,
            ring_bits=RING_BITS,
            threshold=threshold,
            minimum_survivors=threshold,
        )
        generator = np.random.default_rng(1)  # simulated updates, nothing secret
        self.vectors = {name: generator.uniform(-BOUND, BOUND, elements) for name in names}
        self.exact = np.sum(list(self.vectors.values()), axis=0)

    def client_arguments(self, name: str) -> dict[str, Any]:
        return {
            "context": self.context,
            "identity": self.identities[name],
            "client_id": name,
            "roster": self.roster,
            "policy": ClientPolicy(),
        }


def drive(cohort: Cohort, server: Any, clients: dict[str, Any], encode: Callable[[Any], Any]) -> tuple[Any, Meter]:
    """One round of either method: they have the same phases."""
    meter = Meter()
    receivers = {
        "advertise": server.receive_advertisement,
        "share": server.receive_shares,
        "mask": server.receive_masked,
        "confirm": server.receive_confirmation,
        "unmask": server.receive_unmasking,
    }
    closers = (server.publish_keys, server.route_shares, server.publish_survivors, server.publish_confirmations)
    down: dict[str, bytes] = {}
    for index, (phase, receive) in enumerate(receivers.items()):
        for name, client in clients.items():
            with meter.client(phase):
                if phase == "advertise":
                    answer = client.advertise()
                elif phase == "mask":
                    answer = client.mask(down[name], encode(cohort.vectors[name]))
                else:
                    answer = {"share": client.share_keys, "confirm": client.confirm, "unmask": client.unmask}[phase](
                        down[name]
                    )
            meter.serve(receive, name, meter.count(meter.up, name, answer))
        if index < len(closers):
            said = meter.serve(closers[index])
            down = said if isinstance(said, dict) else dict.fromkeys(clients, said)
            for name in clients:
                meter.count(meter.down, name, down[name])
    return meter.serve(server.aggregate), meter


def measure_masks(cohort: Cohort) -> Cost:
    """One round under pairwise masks in the complete graph."""
    n = len(cohort.context.cohort)
    encoding = FixedPointEncoding(ring_bits=RING_BITS, bound=BOUND, cohort=n)
    server = SecAggServer(context=cohort.context, roster=cohort.roster)
    clients = {name: SecAggClient(**cohort.client_arguments(name)) for name in cohort.context.cohort}
    total, meter = drive(cohort, server, clients, encoding.encode)
    decoded = encoding.decode_sum(total, survivors=n)
    return _cost(f"masks, {RING_BITS} bits", MASK_TRUST, cohort, decoded, n / encoding.scale, meter, dealer=None)


def measure_ckks(cohort: Cohort, degree: int, prime_bits: tuple[int, ...], flooding_bits: int) -> Cost:
    """One round under CKKS.

    Raises:
        ParameterError: the parameters are not precise enough for this round.
    """
    parameters = CkksParameters.fitted(
        cohort=len(cohort.context.cohort),
        bound=BOUND,
        length=cohort.context.vector_length,
        degree=degree,
        prime_bits=prime_bits,
        flooding_bits=flooding_bits,
    )
    server = CkksServer(context=cohort.context, parameters=parameters, roster=cohort.roster)
    clients = {
        name: CkksClient(parameters=parameters, **cohort.client_arguments(name)) for name in cohort.context.cohort
    }
    total, meter = drive(cohort, server, clients, lambda vector: vector)
    # The dealer is the one that sent more than everybody else.
    dealer = max(meter.up, key=lambda name: meter.up[name])
    method = f"CKKS {degree}, {'+'.join(map(str, prime_bits))} bits, flooding 2^-{flooding_bits}"
    return _cost(method, CKKS_TRUST, cohort, total, parameters.error_bound, meter, dealer=dealer)


def _cost(
    method: str, trust: str, cohort: Cohort, total: Any, bound: float, meter: Meter, *, dealer: str | None
) -> Cost:
    n = len(cohort.context.cohort)
    error = float(np.abs(total - cohort.exact).max())
    # Summing doubles for comparison is itself off by some last places.
    if not error <= bound + n * n * 2.0**-52:
        raise WrongSum(f"{method}: the sum is off by {error:g}, more than {bound:g}")
    name = next(name for name in cohort.context.cohort if name != dealer)
    phases = {phase: seconds / n for phase, seconds in meter.clients.items()}
    return Cost(
        method=method,
        trust=trust,
        n=n,
        elements=cohort.context.vector_length,
        client_seconds=sum(phases.values()),
        server_seconds=meter.server,
        client_bytes_up=meter.up[name],
        client_bytes_down=meter.down[name],
        dealer_bytes_up=None if dealer is None else meter.up[dealer],
        largest_error=error,
        error_bound=bound,
        phase_seconds=phases,
    )


def measure(sizes: Sequence[tuple[int, int]], sets: Sequence[Any], console: Console) -> dict[str, Any]:
    """Every method at every size, as the JSON that the benchmark prints.

    Raises:
        WrongSum: a measured sum is wrong.
    """
    rows, refused = [], []
    for n, elements in sizes:
        cohort = Cohort(n, elements)
        console.print(f"{n} clients, {elements:,} coordinates: masks", markup=False)
        rows.append(asdict(measure_masks(cohort)))
        for parameters in sets:
            console.print(f"{n} clients, {elements:,} coordinates: CKKS {parameters}", markup=False)
            try:
                rows.append(asdict(measure_ckks(cohort, *parameters)))
            except ParameterError as error:
                refused.append({"n": n, "elements": elements, "parameters": parameters, "reason": error.message})
    import tenseal

    machine = {"processor": _processor(), "python": platform.python_version(), "tenseal": tenseal.__version__}
    return {"machine": machine, "aggregators": rows, "refused": refused}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


HEADINGS = (
    "clients",
    "coordinates",
    "method",
    "client, s",
    "server, s",
    "up, MB",
    "down, MB",
    "error of the sum",
    "bound",
    "trust",
)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """One list of cells for each measured round."""
    return [
        [
            str(row["n"]),
            f"{row['elements']:,}",
            row["method"],
            f"{row['client_seconds']:.3f}",
            f"{row['server_seconds']:.2f}",
            f"{row['client_bytes_up'] / 1e6:.2f}",
            f"{row['client_bytes_down'] / 1e6:.2f}",
            f"{row['largest_error']:.1e}",
            f"{row['error_bound']:.1e}",
            row["trust"],
        ]
        for row in results["aggregators"]
    ]


def print_table(results: dict[str, Any], console: Console) -> None:
    """The table for a terminal."""
    table = Table(title="Masks against CKKS; processor time of one thread, bytes of real messages")
    for heading in HEADINGS:
        table.add_column(heading)
    for cells in table_rows(results):
        table.add_row(*cells)
    console.print(table)
    for item in results["refused"]:
        console.print(
            f"refused: {item['n']} x {item['elements']:,}, {item['parameters']}: {item['reason']}", markup=False
        )


def markdown(results: dict[str, Any]) -> str:
    """The table for docs/ckks.md."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in table_rows(results)])


def plot(results: dict[str, Any], directory: Path) -> list[Path]:
    """Bars of time, bytes and error at the largest size, as SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedpt-secure"
    from matplotlib import pyplot

    most = max(row["n"] * row["elements"] for row in results["aggregators"])
    rows = [row for row in results["aggregators"] if row["n"] * row["elements"] == most][::-1]
    panels = (
        ("client's processor time, s", [row["client_seconds"] for row in rows], "{:.2g}"),
        ("server's processor time, s", [row["server_seconds"] for row in rows], "{:.2g}"),
        (
            "a client's traffic, MB",
            [(row["client_bytes_up"] + row["client_bytes_down"]) / 1e6 for row in rows],
            "{:.3g}",
        ),
        ("largest error of the sum", [row["largest_error"] for row in rows], "{:.1g}"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3.2), sharey=True)
    colours = ["tab:blue" if row["method"].startswith("masks") else "tab:orange" for row in rows]
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh([row["method"] for row in rows], values, color=colours)
        axis.bar_label(bars, labels=[form.format(value) for value in values], padding=2)
        axis.set_xscale("log")
        low, high = min(values), max(values)
        axis.set_xlim(low / 4, high * (high / low) ** 0.4)
        axis.set_title(title, fontsize=10)
    figure.suptitle(f"{rows[0]['n']} clients, {rows[0]['elements']:,} coordinates in [-1, 1]", fontsize=11)
    figure.tight_layout()
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"aggregators_ckks.{suffix}" for suffix in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read measurements, and show them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size and two parameter sets")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--from", dest="read", type=Path, help="show results that --json printed instead of measuring")
    parser.add_argument("--plots", type=Path, help="draw figures into this directory (needs matplotlib)")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    if options.read:
        results = json.loads(options.read.read_text())
    else:
        sizes = [(5, 20_000)] if options.quick else [(5, 20_000), (16, 20_000), (16, 1_000_000)]
        try:
            results = measure(sizes, CKKS_SETS[:2] if options.quick else CKKS_SETS, console)
        except WrongSum as error:
            console.print(f"error: {error}", markup=False)
            return 1
        except CkksUnavailable as error:
            console.print(f"error: {error.message}\nhint: {error.hint}", markup=False)
            return 1
    if options.plots:
        for path in plot(results, options.plots):
            console.print(f"wrote {path}", markup=False)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.markdown:
        print(markdown(results))
    else:
        print_table(results, Console(width=max(Console().width, 160)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
