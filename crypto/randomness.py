"""Where secret bytes come from: an explicit argument everywhere, the operating system by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from fedpt_secure.crypto.errors import ParameterError
from fedpt_secure.crypto.prg import Keystream

RandomBytes = Callable[[int], bytes]
"""`random_bytes(n)` returns n fresh, uniform, unpredictable bytes."""

SYSTEM_RANDOM: Final[RandomBytes] = os.urandom


class InsecureDeterministicBytes:
    """A `RandomBytes` that repeats itself: for test vectors and runs that are openly marked as not private.

    Guarantees nothing: whoever knows the seed knows every key, mask and share drawn from it.

    >>> InsecureDeterministicBytes(b"a")(4) == InsecureDeterministicBytes(b"a")(4)
    True
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) > 32:
            raise ParameterError(f"a seed has at most 32 bytes, not {len(seed)}")
        # The padding makes short, readable seeds usable; secrecy is not the aim here.
        self._stream = Keystream(seed.ljust(32, b"\0"))

    def __call__(self, length: int) -> bytes:
        return self._stream.read(length)
