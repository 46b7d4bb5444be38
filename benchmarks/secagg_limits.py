"""How fast this machine could expand and add masks, and how fast `apply_masks` does."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from secagg_timing import interleaved

from fedpt_secure.crypto.prg import CHUNK_BYTES, apply_masks

MASKS = 16
"""Masks that are added at a time: the complete graph's number for 16 clients, the fewest of the protocol table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Rates in GB/s (10^9 bytes a second) of mask bytes, the best of the rounds, on `threads` threads.

    Attributes:
        threads: that worked at a time.
        elements: uint32 elements of the vector.
        aes_gbps: AES-256 keystream into a buffer in the cache, in the faster of OpenSSL's two modes that make it.
        counter_mode_gbps: the same by OpenSSL's plain counter mode.
        memory_gbps: adding words from the cache to the vector in memory, in place.
        masks_gbps: `apply_masks` with `MASKS` masks.
        one_mask_gbps: `apply_masks` with one mask, on one thread; the vector comes from memory for it alone.
    """

    threads: int
    elements: int
    aes_gbps: float
    counter_mode_gbps: float
    memory_gbps: float
    masks_gbps: float
    one_mask_gbps: float

    @property
    def fraction_of_aes_limit(self) -> float:
        """`masks_gbps` over the keystream alone, as if adding were free."""
        return self.masks_gbps / self.aes_gbps


def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure_limits(threads: int, elements: int, rounds: int) -> Limits:
    """Limits and our rate, in turn, so that the ratio is of one run."""
    vector = np.zeros(elements, dtype=np.uint32)
    masks = [((1, -1)[number % 2], os.urandom(32)) for number in range(MASKS)]
    mask_bytes = vector.nbytes
    with ThreadPoolExecutor(max_workers=threads) as pool:

        def together(work: Callable[[int], None]) -> None:
            for done in [pool.submit(work, thread) for thread in range(threads)]:
                done.result()

        def keystream(mode: modes.Mode) -> Callable[[], None]:
            total = MASKS * mask_bytes // threads
            return lambda: together(lambda _: _keystream(mode, total))

        def add(thread: int) -> None:
            stretch = -(-elements // threads)
            _add(vector[thread * stretch : (thread + 1) * stretch])

        gcm, counter_mode, memory, many, one = interleaved(
            [
                keystream(modes.GCM(bytes(12))),
                keystream(modes.CTR(bytes(16))),
                lambda: together(add),
                lambda: apply_masks(vector, masks, workers=threads),
                lambda: apply_masks(vector, masks[:1], workers=threads),
            ],
            rounds,
        )
    return Limits(
        threads=threads,
        elements=elements,
        aes_gbps=MASKS * mask_bytes / min(gcm, counter_mode) / 1e9,
        counter_mode_gbps=MASKS * mask_bytes / counter_mode / 1e9,
        memory_gbps=mask_bytes / memory / 1e9,
        masks_gbps=MASKS * mask_bytes / many / 1e9,
        one_mask_gbps=mask_bytes / one / 1e9,
    )


def _keystream(mode: modes.Mode, total: int) -> None:
    encryptor = Cipher(algorithms.AES(os.urandom(32)), mode).encryptor()
    zeros, buffer = bytes(CHUNK_BYTES), memoryview(bytearray(CHUNK_BYTES))
    for _ in range(max(1, total // CHUNK_BYTES)):
        encryptor.update_into(zeros, buffer)


def _add(vector: np.ndarray) -> None:
    step = CHUNK_BYTES // vector.itemsize
    words = np.ones(step, dtype=vector.dtype)
    for start in range(0, vector.size, step):
        piece = vector[start : start + step]
        np.add(piece, words[: piece.size], out=piece)
