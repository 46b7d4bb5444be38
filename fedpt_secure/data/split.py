"""From records by client to the training and held-out sets: duplicates out, small clients out, then the split.

What this means for the privacy claim is written down in `docs/data.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from fedpt_secure.data.records import ClientText, Preparation, Record
from fedpt_secure.data.simulation import simulation_key, simulation_order
from fedpt_secure.errors import ConfigError, DataError


def remove_duplicates(clients: Mapping[str, Sequence[Record]]) -> tuple[dict[str, list[Record]], int]:
    """Keep the first of equal records over the whole federation, clients in sorted order, records in theirs.

    Without this, a sentence typed by many would stand in one client's training and in another's held-out set, and the
    evaluation would reward remembering it. Equal means equal `Record.key`; near duplicates stay.

    Returns:
        The records that stay, by client (a client may be left with none), and how many went.
    """
    seen: set[tuple[str, str]] = set()
    kept: dict[str, list[Record]] = {}
    removed = 0
    for client_id in sorted(clients):
        mine = kept.setdefault(client_id, [])
        for record in clients[client_id]:
            if record.key in seen:
                removed += 1
            else:
                seen.add(record.key)
                mine.append(record)
    return kept, removed


def split_client(client_id: str, records: Sequence[Record], *, seed: int, held_out_fraction: float) -> ClientText:
    """Hold out a random part of one client's records.

    **Guarantees.** The result depends on the arguments only: on no other client, and not on the order in which the
    records stand, except that both parts keep it. Adding or removing one record changes the training set by at most
    two (that record, and the one at the border).

    **Assumptions.** The records are distinct (`remove_duplicates`); the seed is public and fixed before training.

    Args:
        client_id: goes into the random order, so that clients are split independently.
        records: at least 2.
        seed: of the simulation.
        held_out_fraction: in (0, 1). The number held out is the nearest whole number, at least 1, and leaves at
        least 1.

    Raises:
        ConfigError: the fraction is not in (0, 1).
        DataError: fewer than 2 records.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ConfigError(f"held_out_fraction {held_out_fraction} must lie between 0 and 1", hint="0.2 is the default")
    if len(records) < 2:
        raise DataError(
            f"client {client_id!r} has {len(records)} distinct records; a split needs at least 2",
            hint="raise minimum_records to 2 or more to leave such clients out",
        )
    count = min(max(1, round(held_out_fraction * len(records))), len(records) - 1)
    contents = [json.dumps(record.key).encode() for record in records]
    order = simulation_order(simulation_key("held-out", seed, client_id), contents)
    chosen = frozenset(order[:count])
    return ClientText(
        client_id,
        train=tuple(record for index, record in enumerate(records) if index not in chosen),
        held_out=tuple(records[index] for index in sorted(chosen)),
    )


def prepare(
    clients: Mapping[str, Sequence[Record]],
    *,
    seed: int,
    minimum_records: int,
    held_out_fraction: float,
    records_read: int,
    unusable: Mapping[str, int],
) -> tuple[list[ClientText], Preparation]:
    """Remove duplicates, leave out clients below the minimum, split each of the others.

    Args:
        clients: records by client id, in source order.
        seed: of the simulation.
        minimum_records: a client with fewer distinct records does not take part; at least 2.
        held_out_fraction: see `split_client`.
        records_read: for the report: all records the source gave.
        unusable: for the report: reason -> count of those that could not be used.

    Raises:
        ConfigError: the minimum is below 2, or the fraction not in (0, 1).
        DataError: no client has enough records.
    """
    if minimum_records < 2:
        raise ConfigError(
            f"minimum_records {minimum_records} must be at least 2: one record to train on, one to hold out"
        )
    distinct, duplicates = remove_duplicates(clients)
    eligible = {name: records for name, records in distinct.items() if len(records) >= minimum_records}
    if not eligible:
        largest = max(map(len, distinct.values()), default=0)
        raise DataError(
            f"none of the {len(distinct):,} clients has {minimum_records} distinct records; "
            f"the largest has {largest:,}",
            hint=_way_out(largest),
        )
    split = [
        split_client(name, eligible[name], seed=seed, held_out_fraction=held_out_fraction) for name in sorted(eligible)
    ]
    return split, Preparation(
        records_read=records_read,
        unusable=dict(unusable),
        duplicates=duplicates,
        clients_below_minimum=len(distinct) - len(eligible),
        records_below_minimum=_total(distinct.values()) - _total(eligible.values()),
    )


def _total(groups: Iterable[Sequence[Record]]) -> int:
    return sum(map(len, groups))


def _way_out(largest: int) -> str:
    if largest >= 2:
        return f"lower minimum_records to {largest} or less, or give the source more text"
    return "give each client at least 2 records that differ"
