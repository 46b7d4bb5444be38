"""Ring vectors on the wire: exactly b bits an element, little-endian, no padding but the last byte's."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from fedpt_secure.crypto.errors import MalformedMessage, ParameterError
from fedpt_secure.crypto.prg import RingVector

SMALLEST_RING_BITS: Final = 16
LARGEST_RING_BITS: Final = 64
_CHUNK_ELEMENTS: Final = 1 << 16  # a multiple of 8, so that every chunk but the last ends on a whole byte


def ring_dtype(ring_bits: int) -> np.dtype[Any]:
    """The word that holds an element of Z_{2^ring_bits}: uint32 up to 32 bits, uint64 above."""
    if not SMALLEST_RING_BITS <= ring_bits <= LARGEST_RING_BITS:
        raise ParameterError(f"ring_bits is {ring_bits}; it must lie in {SMALLEST_RING_BITS}..{LARGEST_RING_BITS}")
    return np.dtype(np.uint32 if ring_bits <= 32 else np.uint64)


def check_vector(vector: RingVector, *, length: int, ring_bits: int) -> None:
    """Accept a vector of `length` elements of Z_{2^ring_bits}.

    Raises:
        ParameterError: dtype or shape is another one, or an element is not below 2^ring_bits.
    """
    dtype = ring_dtype(ring_bits)
    if vector.dtype != dtype or vector.shape != (length,):
        raise ParameterError(
            f"the vector has dtype {vector.dtype} and shape {vector.shape}; the round needs {dtype} and ({length},)"
        )
    if ring_bits < dtype.itemsize * 8 and int(vector.max()) >> ring_bits:
        raise ParameterError(f"an element of the vector is not below 2^{ring_bits}")


def packed_size(length: int, ring_bits: int) -> int:
    """Bytes that `length` elements of Z_{2^ring_bits} take on the wire."""
    return (length * ring_bits + 7) // 8


def reduce_in_place(vector: RingVector, ring_bits: int) -> None:
    """Reduce words modulo 2^ring_bits. Free for 32 and 64 bits, where the word wraps by itself."""
    if ring_bits != vector.dtype.itemsize * 8:
        np.bitwise_and(vector, vector.dtype.type((1 << ring_bits) - 1), out=vector)


def pack(vector: RingVector, ring_bits: int) -> bytes:
    """The canonical bytes of a ring vector; unused bits of the last byte are zero.

    Args:
        vector: [d] of `ring_dtype(ring_bits)`, every element below 2^ring_bits.
    """
    words = vector.astype(vector.dtype.newbyteorder("<"), copy=False)
    word_bits = vector.dtype.itemsize * 8
    if ring_bits == word_bits:
        return words.tobytes()
    pieces = []
    for start in range(0, vector.size, _CHUNK_ELEMENTS):
        chunk = words[start : start + _CHUNK_ELEMENTS]
        octets = chunk.view(np.uint8).reshape(chunk.size, -1)
        if ring_bits % 8 == 0:
            pieces.append(octets[:, : ring_bits // 8].tobytes())
        else:
            bits = np.unpackbits(octets, axis=1, count=ring_bits, bitorder="little")
            pieces.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(pieces)


def add_packed(total: RingVector, packed: bytes | memoryview, ring_bits: int) -> None:
    """Add a packed vector to `total`, in place, modulo the word size, in constant extra memory.

    Raises:
        MalformedMessage: the length is wrong, or unused bits of the last byte are set; `total` is unchanged.
    """
    octets = np.frombuffer(packed, dtype=np.uint8)
    if octets.size != packed_size(total.size, ring_bits):
        raise MalformedMessage(
            f"a vector of {total.size} elements of {ring_bits} bits takes {packed_size(total.size, ring_bits)} bytes, "
            f"not {octets.size}"
        )
    used_bits = total.size * ring_bits % 8
    if used_bits and octets[-1] >> used_bits:
        raise MalformedMessage("unused bits of a packed vector are set; they must be zero")
    word = total.dtype.itemsize
    little = total.dtype.newbyteorder("<")
    if ring_bits == word * 8:
        np.add(total, octets.view(little), out=total)
        return
    for start in range(0, total.size, _CHUNK_ELEMENTS):
        piece = total[start : start + _CHUNK_ELEMENTS]
        chunk = octets[start * ring_bits // 8 : packed_size(start + piece.size, ring_bits)]
        wide = np.zeros((piece.size, word), dtype=np.uint8)
        if ring_bits % 8 == 0:
            wide[:, : ring_bits // 8] = chunk.reshape(piece.size, -1)
        else:
            bits = np.unpackbits(chunk, count=piece.size * ring_bits, bitorder="little")
            packed_rows = np.packbits(bits.reshape(piece.size, ring_bits), axis=1, bitorder="little")
            wide[:, : packed_rows.shape[1]] = packed_rows
        np.add(piece, wide.view(little).reshape(piece.size), out=piece)


def unpack(packed: bytes | memoryview, length: int, ring_bits: int) -> RingVector:
    """The ring vector that `pack` made these bytes from: [length] of `ring_dtype(ring_bits)`.

    Raises:
        MalformedMessage: the bytes are not the canonical encoding of such a vector.
    """
    vector = np.zeros(length, dtype=ring_dtype(ring_bits))
    add_packed(vector, packed, ring_bits)
    return vector
