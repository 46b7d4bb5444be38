"""What whole rounds of secure aggregation cost, as measured, and what follows for sizes that nobody ran.

The costs behind `going_further.py`, whose `--measure` writes them: bytes by the protocol's own encoders, processor
seconds and memory as measured, or through them by a non-negative least-squares fit.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from fedpt_secure.crypto import client_bytes, default_threshold, secure_aggregation_parameters
from fedpt_secure.report.device_plan import DeviceCosts

SCHEMA = "fedpt-secure/going-further-costs/1"
COSTS = Path(__file__).with_name("going_further_costs.json")
CORRUPT = DROPOUT = 0.05
RECORDS = 32
NAME_BYTES = 26
ANNOUNCEMENT_BYTES = 128
RING_BITS = 32
MEASURED_COHORTS = (64, 256, 1_000)


@dataclass(frozen=True)
class Fit:
    """Processor seconds and memory of a round as functions of the cohort n and the degree k, for one vector length.

    A client: a + b n (signatures of all, twice) + c k (shares and masks). The server: b n + c n k (shares of all),
    through the k-regular rounds alone: in the complete graph all secrets have the same holders, which is cheaper. Its
    memory: a + b n + c n k (what it holds of every client and every share).
    """

    client: tuple[float, ...]
    server: tuple[float, ...]
    memory: tuple[float, ...]

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, float]]) -> Fit:
        """Through the measured rounds."""
        sparse = [entry for entry in measured if entry["degree"] < entry["n"] - 1]
        return cls(
            _through(measured, "client_seconds", lambda n, k: (1, n, k)),
            _through(sparse, "server_seconds", lambda n, k: (n, n * k)),
            _through(measured, "server_peak_mb", lambda n, k: (1, n, n * k)),
        )

    def client_seconds(self, n: int, k: int) -> float:
        return self.client[0] + self.client[1] * n + self.client[2] * k

    def server_seconds(self, n: int, k: int) -> float:
        return self.server[0] * n + self.server[1] * n * k

    def server_peak_mb(self, n: int, k: int) -> float:
        return self.memory[0] + self.memory[1] * n + self.memory[2] * n * k


def _through(
    measured: Sequence[Mapping[str, float]], quantity: str, terms: Callable[[float, float], tuple[float, ...]]
) -> tuple[float, ...]:
    columns = np.array([terms(entry["n"], entry["degree"]) for entry in measured], dtype=float)
    found, _ = nnls(columns, np.array([entry[quantity] for entry in measured]))
    return tuple(float(value) for value in found)


@dataclass(frozen=True)
class Round:
    """One round of n clients: what a client moves and computes, what the server does. `mark`: how times are known."""

    n: int
    degree: int
    graph: str
    up: int
    down: int
    client_seconds: float
    server_seconds: float
    server_peak_mb: float
    mark: str


class Costs:
    """What was measured, and everything that follows from it."""

    def __init__(self, measured: Mapping[str, Any], device: DeviceCosts) -> None:
        if measured["schema"] != SCHEMA:
            raise ValueError(f"schema {measured['schema']!r} is not {SCHEMA!r}")
        self.rounds = {entry["n"]: entry for entry in measured["rounds"]}
        self.elements = measured["elements"]
        self.conditions = measured["conditions"]
        self.fit = Fit.of(measured["rounds"])
        configuration = next(c for c in device.configurations if c.rank == 32 and c.layers == 1)
        if configuration.trained_parameters != self.elements:
            raise ValueError("the two sets of costs are of different adapters")
        self.training_seconds = configuration.seconds_per_record * RECORDS

    @classmethod
    def load(cls) -> Costs:
        return cls(json.loads(COSTS.read_text()), DeviceCosts.load())

    def round(self, n: int, *, complete: bool = False, ring_bits: int = RING_BITS) -> Round:
        """Measured where it was, else projected."""
        parameters = secure_aggregation_parameters(n, CORRUPT, DROPOUT)
        if complete and parameters.degree is not None:
            parameters = _complete(n)
        degree = n - 1 if parameters.degree is None else parameters.degree
        size = client_bytes(parameters, elements=self.elements, ring_bits=ring_bits)
        announcement = ANNOUNCEMENT_BYTES + NAME_BYTES * n + 4 * self.elements
        found = self.rounds.get(n)
        if found is not None and found["degree"] == degree:
            times = found["client_seconds"], found["server_seconds"], found["server_peak_mb"]
        else:
            found = None
            times = (
                self.fit.client_seconds(n, degree),
                self.fit.server_seconds(n, degree),
                self.fit.server_peak_mb(n, degree),
            )
        graph = "complete" if degree == n - 1 else "k-regular"
        return Round(n, degree, graph, size.total_up, size.total_down + announcement, *times, "m" if found else "p")


def _complete(n: int) -> Any:
    """The complete graph's parameters, as the federation's rounds use them at every size."""
    sparse = secure_aggregation_parameters(n, CORRUPT, DROPOUT)
    return replace(sparse, degree=None, threshold=default_threshold(n))


def measure(path: Path) -> None:
    """Whole rounds at the sizes that can be run here."""
    from secagg_protocol import measure_protocol
    from secagg_timing import count_cpu_time

    count_cpu_time()
    device = DeviceCosts.load()
    elements = next(c for c in device.configurations if c.rank == 32 and c.layers == 1).trained_parameters
    rounds = []
    for n in MEASURED_COHORTS:
        cost = measure_protocol(n, elements, 1, lambda: None, cpu_time=True)
        print(f"{n} clients: {cost.client_seconds:.3f} s a client, {cost.server_seconds:.2f} s", file=sys.stderr)
        names = ("n", "degree", "threshold", "dropouts", "client_seconds", "client_bytes", "client_bytes_received")
        names = (*names, "server_seconds", "unmask_seconds", "server_peak_mb")
        rounds.append({name: getattr(cost, name) for name in names})
    content = {
        "schema": SCHEMA,
        "command": "python benchmarks/going_further.py --measure benchmarks/going_further_costs.json",
        "conditions": {"machine": platform.machine(), "python": platform.python_version(), "seconds": "processor time"},
        "elements": elements,
        "rounds": rounds,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
