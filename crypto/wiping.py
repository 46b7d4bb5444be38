"""Overwriting secrets, as far as Python allows.

What is overwritten: every secret that the state machines keep between two calls (X25519 scalars and shared
secrets, self-mask seeds, shares) lies in a `bytearray`, and `wipe` fills it with zeros once it has served. The
client's copy of the vector is masked in place.

What is not: `bytes` objects and integers are immutable, so copies made inside PyNaCl, `cryptography` and
Python's big integers (the arguments of X25519, HKDF outputs, Shamir polynomials) stay in freed memory until
it is used again; the operating system may have swapped any of it to disk. A process dump taken during or soon
after a round may hold secrets.
"""

from __future__ import annotations

from collections.abc import Iterable


def wipe(secret: bytearray) -> None:
    """Overwrite a buffer with zeros, in place."""
    secret[:] = bytes(len(secret))


def wipe_all(secrets: Iterable[bytearray]) -> None:
    """Overwrite every buffer with zeros, in place."""
    for secret in secrets:
        wipe(secret)
