"""Hundreds of thousands of devices: the tables of docs/going_further.md, computed from measured costs.

    python benchmarks/going_further.py                                  # the tables; seconds
    python benchmarks/going_further.py --write docs/going_further.md    # into the page, between its markers
    python benchmarks/going_further.py --measure benchmarks/going_further_costs.json    # the costs; minutes of one core

Three kinds of figures, marked in every table:

- m, measured: processor seconds and memory of whole rounds of secure aggregation (`secagg_protocol.py`, 5 % corrupt,
  5 % lost, the built-in proxy's 18,432 parameters), in going_further_costs.json; seconds of a record's gradient, in
  fedpt_secure/report/device_costs.json.
- c, computed without a model: bytes by the protocol's own encoders, noise by the accountant, tails of the binomial.
- p, projected: costs at sizes nobody ran, by a non-negative least-squares fit through the measured ones.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from going_further_costs import CORRUPT, DROPOUT, RING_BITS, Costs, measure
from scipy.stats import binom

from fedpt_secure.crypto import default_threshold
from fedpt_secure.errors import PrivacyError
from fedpt_secure.network.folder import Patience
from fedpt_secure.privacy import RingMechanism, calibrate_noise

EPSILON, DELTA = 4.0, 1e-8
DAYS = 30
DEVICES = (100_000, 500_000)
ROUNDS_A_DAY = 24
COHORT = 1_000
BOUNDS = {"distributed": 16.0, "client": 1.0}
"""Most of a vector's coordinate, in clip norms, by mode; `local` encodes updates up to `training.update_bound`."""


Row = tuple[str, ...]


def by_cohort(costs: Costs) -> list[Row]:
    """One round, by the size of its cohort."""
    rows: list[Row] = [
        (
            "cohort",
            "graph",
            "neighbours",
            "up (c)",
            "down (c)",
            "client, secure aggregation",
            "client, training (m)",
            "server, processor",
            "server, memory",
        )
    ]
    cases = [(64, True), (256, False), (1_000, False), (1_000, True), (4_000, False), (10_000, False)]
    for n, complete in cases:
        one = costs.round(n, complete=complete)
        rows.append(
            (
                f"{n:,}",
                one.graph,
                f"{one.degree:,}",
                size(one.up),
                size(one.down),
                f"{seconds(one.client_seconds)} ({one.mark})",
                seconds(costs.training_seconds),
                f"{seconds(one.server_seconds)} ({one.mark})",
                f"{one.server_peak_mb:.0f} MB ({one.mark})",
            )
        )
    return rows


def most_participations(devices: int, asked: int = COHORT) -> int:
    """Rounds that any device is in, at most, when they are dealt as evenly as `federation.schedule` deals them.

    Args:
        asked: devices a round.
    """
    return math.ceil(ROUNDS_A_DAY * DAYS * asked / devices) + 1


def participation(costs: Costs) -> list[Row]:
    """How often a device is asked."""
    rows: list[Row] = [
        (
            "devices",
            "rounds a day",
            "a device takes part every",
            f"at most in {DAYS} days",
            "processor time a device and day",
        )
    ]
    one = costs.round(COHORT)
    for devices in DEVICES:
        a_day = ROUNDS_A_DAY * COHORT / devices
        busy = a_day * (one.client_seconds + costs.training_seconds)
        rows.append(
            (
                f"{devices:,}",
                f"{ROUNDS_A_DAY} of {COHORT:,} (c)",
                f"{1 / a_day:.1f} days (c)",
                f"{most_participations(devices)} rounds (c)",
                f"{busy:.2f} s ({one.mark})",
            )
        )
    return rows


@cache
def ring_mechanism(mode: str, noise_multiplier: float, elements: int, cohort: int) -> tuple[int, RingMechanism]:
    """The mechanism in the smallest ring that holds it, and that ring's bits.

    Raises:
        PrivacyError: no ring of up to 64 bits does.
    """
    lost, corrupt = math.floor(DROPOUT * cohort), math.ceil(CORRUPT * cohort)
    for ring_bits in range(16, 65):
        try:
            found = RingMechanism.plan(
                noise_multiplier=noise_multiplier,
                honest_shares=cohort - lost - corrupt,
                cohort=cohort,
                dimension=elements,
                coordinate_bound=BOUNDS[mode],
                ring_bits=ring_bits,
            )
        except PrivacyError:
            continue
        return ring_bits, found
    raise PrivacyError("no ring holds the noise")


@cache
def noise(devices: int, asked: int = COHORT) -> float:
    """Multiplier for the promise over all rounds that a device is in."""
    return calibrate_noise(epsilon=EPSILON, delta=DELTA, sampling_rate=1.0, steps=most_participations(devices, asked))


def shares(
    mode: str, devices: int, elements: int, *, cohort: int = COHORT, asked: int = COHORT
) -> tuple[int, float, float]:
    """Ring bits; standard deviation that one device adds, and that the mean over the survivors has, in clip norms.

    Args:
        cohort: devices whose vectors make one sum.
        asked: devices a round, in all its sums.
    """
    survivors, multiplier = cohort - math.floor(DROPOUT * cohort), noise(devices, asked)
    if mode == "local":
        return RING_BITS, multiplier, multiplier / math.sqrt(survivors)
    ring_bits, mechanism = ring_mechanism(mode, multiplier, elements, cohort)
    own = mechanism.share_sigma / mechanism.encoding.scale
    return ring_bits, own, own / math.sqrt(survivors)


MODES = ("local", "distributed", "client")
UNITS = {"local": "a record", "distributed": "a record", "client": "a device"}


def by_mode(costs: Costs) -> list[Row]:
    """Noise and bytes of each privacy mode."""
    rows: list[Row] = [
        (
            "mode",
            "protects",
            "devices",
            "multiplier (c)",
            "a device adds (c)",
            "on the mean (c)",
            "ring (c)",
            "a participation moves (c)",
            "a day, on average (c)",
            f"in {DAYS} days, at most (c)",
        )
    ]
    for mode in MODES:
        for devices in DEVICES:
            ring_bits, own, on_mean = shares(mode, devices, costs.elements)
            one = costs.round(COHORT, ring_bits=ring_bits)
            moved = one.up + one.down
            rows.append(
                (
                    mode,
                    UNITS[mode],
                    f"{devices:,}",
                    f"{noise(devices):.2f}",
                    f"{own:.3f}",
                    f"{on_mean:.4f}",
                    f"{ring_bits} bits",
                    size(moved),
                    size(moved * ROUNDS_A_DAY * COHORT / devices),
                    size(moved * most_participations(devices)),
                )
            )
    return rows


def budgets(costs: Costs) -> list[Row]:
    """Rounds a day that a bandwidth budget carries, and the noise that so many participations would take."""
    rows: list[Row] = [("budget a device and day", *(f"mode {mode}: participations a day (c)" for mode in MODES))]
    for budget in (100e3, 1e6, 10e6):
        cells = []
        for mode in MODES:
            one = costs.round(COHORT, ring_bits=shares(mode, DEVICES[0], costs.elements)[0])
            cells.append(f"{budget / (one.up + one.down):.2g}")
        rows.append((size(budget), *cells))
    return rows


def completing() -> list[Row]:
    """How likely a round whose cohort was named beforehand is to have enough survivors."""
    available = (0.95, 0.9, 0.8, 0.7, 0.5)
    rows: list[Row] = [("cohort", "must survive", *(f"{share:.0%} available (c)" for share in available))]
    for n in (64, COHORT):
        needed = default_threshold(n)
        cells = [f"{binom.sf(needed - 1, n, share):.3g}" for share in available]
        rows.append((f"{n:,}", f"{needed:,}", *cells))
    return rows


def server_days(costs: Costs) -> list[Row]:
    """A server's day."""
    patience = Patience()
    longest = patience.gather_seconds + 4 * patience.phase_seconds + patience.training_seconds
    rows: list[Row] = [
        (
            "cohorts at once",
            "rounds a day, each",
            "devices asked a day (c)",
            "received a day (c)",
            "sent a day (c)",
            "processor, hours of one core a day",
            "memory",
        )
    ]
    one = costs.round(COHORT)
    for groups, rounds in ((1, ROUNDS_A_DAY), (1, math.floor(86_400 / longest)), (10, ROUNDS_A_DAY)):
        asked = groups * rounds * COHORT
        rows.append(
            (
                f"{groups}",
                f"{rounds}",
                f"{asked:,}",
                size(asked * one.up),
                size(asked * one.down),
                f"{groups * rounds * one.server_seconds / 3600:.2f} ({one.mark})",
                f"{groups * one.server_peak_mb:.0f} MB ({one.mark if groups == 1 else 'p'})",
            )
        )
    return rows


def hierarchies(costs: Costs) -> list[Row]:
    """Ten thousand devices a round, three ways."""
    n, groups = 10_000, 10
    devices = DEVICES[1]
    flat, group = costs.round(n), costs.round(n // groups)
    rows: list[Row] = [
        (
            f"{n:,} devices a round",
            "what a server sees",
            "noise on the mean: local (c)",
            "distributed (c)",
            "client (c)",
            "a device moves (c)",
            "client, secure aggregation",
            "servers, processor",
        )
    ]
    in_groups = [shares(mode, devices, costs.elements, cohort=n // groups, asked=n) for mode in MODES]
    flat_shares = [shares(mode, devices, costs.elements, cohort=n, asked=n) for mode in MODES]
    root = math.sqrt(groups)
    partial = [f"{on_mean / root:.4f}" for _, _, on_mean in in_groups]
    whole = [f"{on_mean:.4f}" for _, _, on_mean in flat_shares]
    group_cells = (
        size(group.up + group.down),
        f"{seconds(group.client_seconds)} ({group.mark})",
        f"{seconds(groups * group.server_seconds)} (p)",
    )
    rows.append(
        (
            "one flat round",
            "one sum over all",
            *whole,
            size(flat.up + flat.down),
            f"{seconds(flat.client_seconds)} ({flat.mark})",
            f"{seconds(flat.server_seconds)} ({flat.mark})",
        )
    )
    rows.append((f"{groups} groups, their sums opened", f"{groups} partial sums", *partial, *group_cells))
    name, seen = f"{groups} groups, their sums never opened (not built)", "one sum, if leaf and root do not collude"
    rows.append((name, seen, *whole, *group_cells))
    return rows


TABLES: dict[str, Callable[[Costs], list[Row]]] = {
    "cohorts": by_cohort,
    "participation": participation,
    "modes": by_mode,
    "budgets": budgets,
    "completing": lambda costs: completing(),
    "server": server_days,
    "hierarchies": hierarchies,
}


def render(rows: Sequence[Row]) -> str:
    """Markdown; the first row is the heading."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with its tables replaced.

    Raises:
        ValueError: the page lacks the marker of a table, or has one that nobody fills.
    """
    found = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(found) != sorted(tables):
        raise ValueError(f"the page has markers for {found}, the tables are {list(tables)}")
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n)(?:(?!<!--).)*(<!-- end -->)"
        page, count = re.subn(pattern, lambda hit, table=table: f"{hit[1]}{table}\n{hit[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"table {name} has no end")
    return page


def size(count: float) -> str:
    """Bytes in a unit of three digits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def seconds(count: float) -> str:
    """Seconds, or milliseconds, in three digits."""
    return f"{count:.3g} s" if count >= 1 else f"{1e3 * count:.3g} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, write or measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables of a page")
    parser.add_argument("--measure", type=Path, metavar="JSON", help="measure the costs of whole rounds")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(options.measure)
        return 0
    costs = Costs.load()
    tables = {name: render(table(costs)) for name, table in TABLES.items()}
    if options.write:
        options.write.write_text(filled(options.write.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
