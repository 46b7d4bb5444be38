"""Mask expansion: AES-256 in counter mode, added into a ring vector in place.

The keystream of AES-256-CTR (NIST SP 800-38A) under a key that is used once is indistinguishable from uniform
bytes if AES is a pseudo-random permutation; read as little-endian words it is uniform in Z_{2^32} or
Z_{2^64}, and its low b bits are uniform in Z_{2^b}. The counter starts at zero, which is safe because every
key is derived for exactly one stream.

The expansion is nearly all that masking costs, so it is made in the way that is fastest on the machine. Under a nonce
of zeros, AES-GCM encrypts by the blocks of this very stream from the third one on (SP 800-38D, section 7.1: its counter
goes on from 0^96 | 2). On a processor with VAES, OpenSSL computes these four to a register, where its plain counter
mode takes one: 20 GB/s a core against 8. Without VAES GCM is the slower one. The bytes are the same, and GCM's
authentication tag is never asked for.

`cryptography` releases the GIL inside AES and NumPy inside the addition, so threads help where cores are
free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from threading import Lock
from time import perf_counter
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedpt_secure.crypto.errors import ParameterError

RingVector = npt.NDArray[Any]
"""A 1-D array of dtype uint32 (up to 32 bits) or uint64 (above), the elements of Z_{2^b}."""

CHUNK_BYTES: Final = 1 << 18
"""Keystream made at a time: small enough that the chunk and its piece of the vector stay in a core's cache."""

AES_BLOCK_BYTES: Final = 16
_STREAMS_AT_ONCE: Final = 256  # cipher states alive per worker; bounds memory when thousands of masks are undone
_ZEROS: Final = bytes(CHUNK_BYTES)

_CACHE_LINE_BYTES: Final = 64
_HEAD_BYTES: Final = 2 * AES_BLOCK_BYTES  # blocks that come before the first one of GCM
_GCM_NONCE: Final = bytes(12)

SignedKey = tuple[Literal[1, -1], bytes]
"""Whether a mask is added or subtracted, and the 32-byte key it is expanded from."""


class Keystream:
    """The AES-256-CTR keystream of one key, from a block offset on. A key must serve for one stream only.

    From block 0 the stream may end after 64 GiB, where GCM's counter does (`ValueError`); no ring vector is more than a
    quarter as long.
    """

    def __init__(self, key: bytes, *, first_block: int = 0) -> None:
        if first_block:
            self._head, self._rest = b"", _counter_mode(key, first_block)
        else:
            self._head, self._rest = _from_the_start(key)

    def fill(self, buffer: memoryview) -> None:
        """Overwrite `buffer` (bytes, at most `CHUNK_BYTES`) with the next keystream bytes."""
        head = self._head[: len(buffer)]
        self._head = self._head[len(head) :]
        buffer[: len(head)] = head
        self._rest.update_into(memoryview(_ZEROS)[: len(buffer) - len(head)], buffer[len(head) :])

    def read(self, length: int) -> bytes:
        """The next `length` keystream bytes."""
        head = self._head[:length]
        self._head = self._head[len(head) :]
        return head + self._rest.update(bytes(length - len(head)))


def _counter_mode(key: bytes, first_block: int) -> CipherContext:
    if len(key) != 32:
        raise ParameterError(f"a keystream key has 32 bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(first_block.to_bytes(AES_BLOCK_BYTES, "big"))).encryptor()


def _from_the_start(key: bytes) -> tuple[bytes, CipherContext]:
    """The first `_HEAD_BYTES` of a key's stream, and the context that encrypts zeros to all that follow."""
    counter_mode = _counter_mode(key, 0)
    head = counter_mode.update(bytes(_HEAD_BYTES))
    if _gcm_is_faster():
        return head, Cipher(algorithms.AES(key), modes.GCM(_GCM_NONCE)).encryptor()
    return head, counter_mode


@cache
def _gcm_is_faster() -> bool:
    """Whether this machine makes keystream faster in GCM than in counter mode; tried once, in about a millisecond.

    It decides on speed alone: the bytes do not depend on it.
    """
    buffer = bytearray(CHUNK_BYTES)

    def seconds(encryptor: CipherContext) -> float:
        marks = [perf_counter()]
        for _ in range(4):
            encryptor.update_into(_ZEROS, buffer)
            marks.append(perf_counter())
        return min(after - before for before, after in pairwise(marks))

    key = bytes(32)
    return seconds(Cipher(algorithms.AES(key), modes.GCM(_GCM_NONCE)).encryptor()) < seconds(_counter_mode(key, 0))


def apply_masks(vector: RingVector, masks: Sequence[SignedKey], *, workers: int = 1) -> None:
    """Add or subtract the expansion of every key, in place, modulo 2^32 or 2^64.

    Memory beyond the vector is constant per worker (two chunks and 256 cipher states). Reducing modulo
    2^b for other ring sizes is left to the caller, once, since wrapping at the word is compatible with it.

    Args:
        vector: [d], uint32 or uint64, contiguous.
        masks: sign and key of each mask.
        workers: threads; each expands its own part of the keys. The result does not depend on their number or order,
            since addition in the ring does not.
    """
    if vector.dtype.kind != "u" or vector.dtype.itemsize not in (4, 8) or vector.ndim != 1:
        raise ParameterError(f"masks apply to 1-D uint32 or uint64 vectors, not {vector.dtype} {vector.shape}")
    if not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ParameterError("masks apply to contiguous, writeable vectors")
    if workers < 1:
        raise ParameterError(f"at least one worker is needed, not {workers}")
    if not masks or not vector.size:
        return
    workers = min(workers, len(masks))
    if workers == 1:
        _apply(vector, masks, None)
        return
    lock = Lock()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for done in [pool.submit(_apply, vector, masks[part::workers], lock) for part in range(workers)]:
            done.result()


def _apply(vector: RingVector, masks: Sequence[SignedKey], lock: Lock | None) -> None:
    # Masks are words in little-endian order on every machine, or two machines' masks would not cancel.
    chunk = _cache_aligned(CHUNK_BYTES, vector.dtype.newbyteorder("<"))
    gathered = _cache_aligned(CHUNK_BYTES if lock else 0, vector.dtype)
    for first in range(0, len(masks), _STREAMS_AT_ONCE):
        streams = []
        for sign, key in masks[first : first + _STREAMS_AT_ONCE]:
            combine = np.add if sign > 0 else np.subtract
            head, rest = _from_the_start(key)
            streams.append((combine, rest.update_into))
            words = np.frombuffer(head, dtype=chunk.dtype)[: vector.size]
            with lock or nullcontext():
                combine(vector[: words.size], words, out=vector[: words.size])
        # Chunk outside, masks inside: the piece of the vector is read into the cache once for all masks.
        for start, stop in _pieces(vector, chunk.size):
            piece, words = vector[start:stop], chunk[: stop - start]
            if lock is None:
                _add_next(piece, words, streams)
                continue
            # Others work on the same piece: what this thread has for it is gathered first and added at one go.
            part = gathered[: piece.size]
            part.fill(0)
            _add_next(part, words, streams)
            with lock:
                np.add(piece, part, out=piece)
    chunk.fill(0)
    gathered.fill(0)


def _pieces(vector: RingVector, most: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the pieces, of at most `most` elements, that follow the head.

    All but the first begin on a cache line where the vector's own address allows it: vector instructions that straddle
    two lines cost a tenth of the speed.
    """
    head = _HEAD_BYTES // vector.itemsize
    lead = -(vector.ctypes.data + _HEAD_BYTES) % _CACHE_LINE_BYTES // vector.itemsize
    bounds = [head, *range(head + lead, vector.size, most), vector.size]
    return ((start, stop) for start, stop in pairwise(bounds) if start < stop)


def _cache_aligned(size: int, dtype: np.dtype[Any]) -> RingVector:
    """`size` bytes that begin on a cache line; NumPy aligns to 16 bytes only."""
    octets = np.empty(size + _CACHE_LINE_BYTES, dtype=np.uint8)
    start = -octets.ctypes.data % _CACHE_LINE_BYTES
    return octets[start : start + size].view(dtype)


def _add_next(
    piece: RingVector, words: RingVector, streams: Sequence[tuple[np.ufunc, Callable[[memoryview, memoryview], int]]]
) -> None:
    """Combine `piece` with the words that come next in each stream; `words` is where they are made."""
    buffer = words.data.cast("B")
    zeros = memoryview(_ZEROS)[: len(buffer)]
    for combine, update_into in streams:
        update_into(zeros, buffer)
        combine(piece, words, piece)
