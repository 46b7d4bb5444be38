"""Public, reproducible randomness for arranging the simulation: who owns which record, and what is held out.

Nothing here is secret: whoever knows the seed knows the arrangement. Keys, masks and noise never come from this
module.
"""

from __future__ import annotations

import hashlib

import numpy as np


def simulation_key(purpose: str, seed: int, *names: str) -> bytes:
    """32 bytes that depend on the purpose, the seed and the names, and on nothing else.

    Each part is hashed with its length before it, so that ("ab", "c") and ("a", "bc") differ. A key made for one
    client does not change when other clients come or go.
    """
    digest = hashlib.sha256(b"fedpt-secure/simulation/v1")
    for part in (purpose, str(seed), *names):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


def simulation_order(key: bytes, items: list[bytes]) -> list[int]:
    """The indices of `items` in a pseudorandom order: by SHA-256 of key and item.

    The place of two items relative to each other depends on these two only, so adding or removing an item leaves the
    order of the others as it was. Unlike a NumPy shuffle, the order is the same in every version of every library.
    Equal items keep their order.
    """
    ranks = [hashlib.sha256(key + item).digest() for item in items]
    return sorted(range(len(items)), key=ranks.__getitem__)


def simulation_rng(purpose: str, seed: int, *names: str) -> np.random.Generator:
    """A NumPy generator for draws that need a distribution; seeded by `simulation_key`."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(simulation_key(purpose, seed, *names), "big")))
