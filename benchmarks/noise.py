"""How fast the exact noise of secure sums is drawn, beside the keystream that it is made of.

    python benchmarks/noise.py                 # half a minute
    python benchmarks/noise.py --json

Arms, in turn, on one thread: the sampler of modes `distributed` and `client` (`privacy.discrete_gaussian`); the same
number of words from AES-256-CTR and nothing else, which is its limit; NumPy's normal variates, rounded, which are
neither exact nor unpredictable; and OpenDP's exact sampler, where `opendp` is installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from secagg_timing import interleaved

from fedpt_secure.privacy import SecureRandom
from fedpt_secure.privacy.discrete_gaussian import discrete_gaussian

ENTRIES = 147_456
"""Of the adapter that `utility.py` trains."""
SIGMAS = (1000, 60_000, 1 << 20)
OPENDP_ENTRIES = 4096
"""A sampler of one number at a time is timed on fewer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    results = [measure(sigma, options.entries, options.repeats) for sigma in SIGMAS]
    if options.json:
        print(json.dumps({"machine": platform.processor() or platform.machine(), "results": results}, indent=2))
        return 0
    table = Table(title=f"{options.entries:,} entries, milliseconds, best of {options.repeats}")
    for name in results[0]:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in result.values()))
    Console().print(table)
    return 0


def measure(sigma: int, entries: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each arm for this many entries; words for each; the share of the keystream's speed."""
    source, rng = SecureRandom(), np.random.default_rng(0)
    words = words_drawn(sigma, entries)
    arms: dict[str, Callable[[], object]] = {
        "exact": lambda: source.discrete_gaussian(entries, sigma=sigma),
        "its keystream": lambda: source.random_bytes(8 * words),
        "rounded normals": lambda: np.rint(rng.normal(0.0, sigma, entries)).astype(np.int64),
    }
    if importlib.util.find_spec("opendp"):
        arms["opendp"] = _opendp(sigma, min(entries, OPENDP_ENTRIES))
    seconds = dict(zip(arms, interleaved(list(arms.values()), repeats), strict=True))
    if "opendp" in seconds:
        seconds["opendp"] *= entries / min(entries, OPENDP_ENTRIES)
    return {
        "sigma": sigma,
        "words an entry": words / entries,
        **{name: 1e3 * value for name, value in seconds.items()},
        "of the keystream's speed": seconds["its keystream"] / seconds["exact"],
    }


def words_drawn(sigma: int, entries: int) -> int:
    """How many 64-bit words the sampler takes for this many entries; it varies a little."""
    source, drawn = SecureRandom(), 0

    def counting(size: int) -> np.ndarray:
        nonlocal drawn
        drawn += size
        return np.frombuffer(bytearray(source.random_bytes(8 * size)), dtype="<u8")

    discrete_gaussian(entries, sigma=sigma, words=counting)
    return drawn


def _opendp(sigma: int, entries: int) -> Callable[[], object]:
    dp = importlib.import_module("opendp.prelude")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    sampler = dp.m.make_gaussian(*space, scale=float(sigma))
    zeros = [0] * entries
    return lambda: sampler(zeros)


if __name__ == "__main__":
    raise SystemExit(main())
