"""Which entries of the adapter are trained, where not all of them are."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """A public choice of entries: the first columns of B in some layers.

    The rows of A are ordered directions, the most important first (`lm.directions`), so that the first `rank` columns
    of B with the first rows of A are the adapter of that rank: parts of several ranks are parts of one vector.

    Attributes:
        layers: indices of the layers that are trained; None for all that have an adapter.
        rank: columns of B that are trained, the first ones; None for all.
    """

    layers: frozenset[int] | None = None
    rank: int | None = None


WHOLE = TrainedPart()
"""The whole adapter."""


def place_of(name: str) -> tuple[int, str] | None:
    """The layer that a parameter or module of this name is in, and its name there; None outside the layers."""
    found = _LAYER.search(name)
    return None if found is None else (int(found.group(1)), found.group(2))


def layer_of(name: str) -> int | None:
    """The layer alone."""
    place = place_of(name)
    return None if place is None else place[0]
