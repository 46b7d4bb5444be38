"""Mask expansion: AES-256 in counter mode, added into a ring vector in place.

The keystream of AES-256-CTR (NIST SP 800-38A) under a key that is used once is indistinguishable from uniform
bytes if AES is a pseudo-random permutation; read as little-endian words it is uniform in Z_{2^32} or
Z_{2^64}, and its low b bits are uniform in Z_{2^b}. The counter starts at zero, which is safe because every
key is derived for exactly one stream.

`cryptography` releases the GIL inside AES and NumPy inside the addition, so threads help where cores are
free.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedpt_secure.crypto.errors import ParameterError

RingVector = npt.NDArray[Any]
"""A 1-D array of dtype uint32 (up to 32 bits) or uint64 (above), the elements of Z_{2^b}."""

CHUNK_BYTES: Final = 1 << 18
"""Keystream made at a time: small enough that the chunk and its piece of the vector stay in a core's cache."""

AES_BLOCK_BYTES: Final = 16
_STREAMS_AT_ONCE: Final = 256  # cipher states alive per worker; bounds memory when thousands of masks are undone
_ZEROS: Final = bytes(CHUNK_BYTES)

SignedKey = tuple[Literal[1, -1], bytes]
"""Whether a mask is added or subtracted, and the 32-byte key it is expanded from."""


class Keystream:
    """The AES-256-CTR keystream of one key, from a block offset on. A key must serve for one stream only."""

    def __init__(self, key: bytes, *, first_block: int = 0) -> None:
        if len(key) != 32:
            raise ParameterError(f"a keystream key has 32 bytes, not {len(key)}")
        counter = first_block.to_bytes(AES_BLOCK_BYTES, "big")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def fill(self, buffer: memoryview) -> None:
        """Overwrite `buffer` (bytes, at most `CHUNK_BYTES`) with the next keystream bytes."""
        self._encryptor.update_into(memoryview(_ZEROS)[: len(buffer)], buffer)

    def read(self, length: int) -> bytes:
        """The next `length` keystream bytes."""
        return self._encryptor.update(bytes(length))


def apply_masks(vector: RingVector, masks: Sequence[SignedKey], *, workers: int = 1) -> None:
    """Add or subtract the expansion of every key, in place, modulo 2^32 or 2^64.

    Memory beyond the vector is constant per worker (one chunk and 256 cipher states). Reducing modulo
    2^b for other ring sizes is left to the caller, once, since wrapping at the word is compatible with it.

    Args:
        vector: [d], uint32 or uint64, contiguous.
        masks: sign and key of each mask.
        workers: threads; each works on its own stretch of the vector.
    """
    if vector.dtype.kind != "u" or vector.dtype.itemsize not in (4, 8) or vector.ndim != 1:
        raise ParameterError(f"masks apply to 1-D uint32 or uint64 vectors, not {vector.dtype} {vector.shape}")
    if not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ParameterError("masks apply to contiguous, writeable vectors")
    if workers < 1:
        raise ParameterError(f"at least one worker is needed, not {workers}")
    if not masks or not vector.size:
        return
    step = CHUNK_BYTES // vector.dtype.itemsize
    chunks = -(-vector.size // step)
    stretch = -(-chunks // workers) * step
    stretches = [(start, min(start + stretch, vector.size)) for start in range(0, vector.size, stretch)]
    if len(stretches) == 1:
        _apply_stretch(vector, masks, 0, vector.size)
        return
    with ThreadPoolExecutor(max_workers=len(stretches)) as pool:
        for done in [pool.submit(_apply_stretch, vector, masks, start, stop) for start, stop in stretches]:
            done.result()


def _apply_stretch(vector: RingVector, masks: Sequence[SignedKey], start: int, stop: int) -> None:
    # Masks are words in little-endian order on every machine, or two machines' masks would not cancel.
    chunk = np.empty(CHUNK_BYTES // vector.dtype.itemsize, dtype=vector.dtype.newbyteorder("<"))
    for first in range(0, len(masks), _STREAMS_AT_ONCE):
        _apply_batch(vector, masks[first : first + _STREAMS_AT_ONCE], start, stop, chunk)
    chunk.fill(0)


def _apply_batch(vector: RingVector, masks: Sequence[SignedKey], start: int, stop: int, chunk: RingVector) -> None:
    word = vector.dtype.itemsize
    first_block = start * word // AES_BLOCK_BYTES
    streams = [(sign, Keystream(key, first_block=first_block)) for sign, key in masks]
    octets = chunk.data.cast("B")
    for position in range(start, stop, chunk.size):
        piece = vector[position : min(position + chunk.size, stop)]
        words, buffer = chunk[: piece.size], octets[: piece.size * word]
        # Chunk outside, masks inside: the piece of the vector is read into the cache once for all masks.
        for sign, stream in streams:
            stream.fill(buffer)
            if sign > 0:
                np.add(piece, words, out=piece)
            else:
                np.subtract(piece, words, out=piece)
