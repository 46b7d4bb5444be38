"""Deal records without an owner to simulated clients. Only done when asked for explicitly."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from fedpt_secure.data.simulation import simulation_key, simulation_order, simulation_rng
from fedpt_secure.errors import ConfigError, DataError

_NOTHING = 1e-12
"""A mixture whose open labels weigh less has none left: a quotient of such numbers would be rounding."""


def client_names(clients: int) -> list[str]:
    """`client-0`, `client-1`, ... with leading zeros, so that sorted order is numerical order."""
    width = len(str(clients - 1))
    return [f"client-{index:0{width}d}" for index in range(clients)]


def partition_equal(records: int, clients: int, *, seed: int) -> list[int]:
    """Deal `records` records to `clients` clients in random order; sizes differ by at most one.

    Returns:
        The client's index of each record.

    Raises:
        DataError: more clients than records.
    """
    _check_counts(records, clients)
    owners = [0] * records
    for place, index in enumerate(_random_order(records, seed)):
        owners[index] = place % clients
    return owners


def partition_sizes(records: int, clients: int, *, alpha: float, seed: int) -> list[int]:
    """Deal records in random order to clients whose shares of the whole are one draw from Dirichlet(alpha, ...,
    alpha).

    This skews sizes, not contents: it is what a Dirichlet partition can do without labels. Clients may be left with
    nothing.

    Args:
        records: how many there are.
        clients: among how many.
        alpha: concentration; small is uneven, large is equal.
        seed: of the simulation.

    Returns:
        The client's index of each record.

    Raises:
        ConfigError: alpha is not a positive finite number.
        DataError: more clients than records.
    """
    _check_counts(records, clients)
    _check_alpha(alpha)
    shares = _dirichlet(simulation_rng("partition-sizes", seed), np.full(clients, alpha))
    bounds = np.floor(np.cumsum(shares)[:-1] * records).astype(int).tolist()
    owners = [0] * records
    for place, index in enumerate(_random_order(records, seed)):
        owners[index] = bisect_right(bounds, place)
    return owners


def partition_labels(labels: Sequence[str], clients: int, *, alpha: float, seed: int) -> list[int]:
    """Give clients of equal size different mixtures of labels (Hsu, Qi, Brown 2019, arXiv 1909.06335, section 3).

    Each client draws a mixture q ~ Dirichlet(alpha * p) with p the labels' frequencies, then draws records by it
    without replacement. When a label runs out, its share of every mixture falls to the labels that are left, in
    proportion; a client whose labels have all run out draws a new mixture of what is left. Clients take one record each
    in turn, so that leftovers do not gather at the last one. Sizes differ by at most one.

    Args:
        labels: of each record.
        clients: among how many.
        alpha: concentration; near 0 a client has one label, at infinity all have the same mixture.
        seed: of the simulation.

    Returns:
        The client's index of each record.

    Raises:
        ConfigError: alpha is not a positive finite number.
        DataError: more clients than records.
    """
    _check_counts(len(labels), clients)
    _check_alpha(alpha)
    rng = simulation_rng("partition-labels", seed)
    names = sorted(set(labels))
    place = {name: index for index, name in enumerate(names)}
    pools: list[list[int]] = [[] for _ in names]
    # Popped from the end: each pool gives its records in random order.
    for index in _random_order(len(labels), seed):
        pools[place[labels[index]]].append(index)
    left = np.array([len(pool) for pool in pools], dtype=float)
    mixtures = np.stack([_mixture(rng, alpha, left) for _ in range(clients)])
    owners = [0] * len(labels)
    ends = _interval_ends(mixtures)
    for turn, uniform in enumerate(rng.random(len(labels)).tolist()):
        client = turn % clients
        label = bisect_right(ends[client], uniform)
        owners[pools[label].pop()] = client
        left[label] -= 1
        if not pools[label] and left.any():
            mixtures[:, label] = 0.0
            totals = mixtures.sum(axis=1)
            for gone in np.flatnonzero(totals < _NOTHING):
                mixtures[gone] = _mixture(rng, alpha, left)
                totals[gone] = 1.0
            mixtures /= totals[:, np.newaxis]
            ends = _interval_ends(mixtures)
    return owners


def _mixture(rng: np.random.Generator, alpha: float, left: np.ndarray) -> np.ndarray:
    """One draw from Dirichlet(alpha * p), p the frequencies of what is left; nothing of a label that has run out."""
    mixture = np.zeros(len(left))
    open_labels = left > 0
    mixture[open_labels] = _dirichlet(rng, alpha * left[open_labels] / left.sum())
    return mixture


def _interval_ends(mixtures: np.ndarray) -> list[list[float]]:
    """Upper ends of the labels' intervals in [0, 1), by client; a label without weight has an empty interval."""
    ends = np.cumsum(mixtures, axis=1)
    # A sum that rounds to just below 1 must not send a draw past the last label with weight.
    ends[ends >= ends[:, -1:]] = 1.0
    rows: list[list[float]] = ends.tolist()
    return rows


def _dirichlet(rng: np.random.Generator, concentration: np.ndarray) -> np.ndarray:
    """One draw. A concentration that underflowed to 0 would never be drawn, and nothing but such would give no draw."""
    return rng.dirichlet(np.maximum(concentration, np.finfo(float).tiny))


def _random_order(records: int, seed: int) -> list[int]:
    return simulation_order(simulation_key("partition", seed), [index.to_bytes(8, "big") for index in range(records)])


def _check_counts(records: int, clients: int) -> None:
    if clients < 1:
        raise ConfigError(f"clients {clients} must be at least 1")
    if records < clients:
        raise DataError(
            f"{records:,} records cannot be dealt to {clients:,} clients",
            hint="ask for fewer clients or give more text",
        )


def _check_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"dirichlet_alpha {alpha} must be a positive number", hint="0.3 is uneven, 100 nearly equal")
