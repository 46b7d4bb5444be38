"""The keystream against AES itself, block by block, and masks over threads against plain sums."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedpt_secure.crypto import prg
from fedpt_secure.crypto.prg import CHUNK_BYTES, Keystream, apply_masks

KEY = bytes(range(32))


@pytest.fixture(autouse=True, params=[True, False], ids=["by GCM", "by counter mode"])
def _both_ways(request, monkeypatch):
    """Which mode makes the stream is a matter of speed: everything here holds for both."""
    monkeypatch.setattr(prg, "_gcm_is_faster", lambda: request.param)


def _counter_blocks(key, count):
    """AES-256 of the counters 0, 1, ..., one block after the other: the definition, without a mode's help."""
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return b"".join(aes.update(number.to_bytes(16, "big")) for number in range(count))


@pytest.mark.parametrize("sizes", [[0, 1], [16, 16, 16], [31, 1, 1], [33, 100], [5, 40, 7], [4096]])
def test_the_stream_is_aes_of_counters_from_zero_however_it_is_read(sizes):
    expected = _counter_blocks(KEY, 300)
    stream, filled = Keystream(KEY), Keystream(KEY)
    position = 0
    for size in sizes:
        piece = expected[position : position + size]
        assert stream.read(size) == piece
        buffer = bytearray(size)
        filled.fill(memoryview(buffer))
        assert buffer == piece
        position += size


def test_the_stream_is_that_of_counter_mode_far_from_its_start():
    length = 5 * CHUNK_BYTES + 17
    counter_mode = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    assert Keystream(KEY).read(length) == counter_mode.update(bytes(length))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("length", [1, 3, 8, 9, CHUNK_BYTES // 4 + 8, 3 * CHUNK_BYTES // 4 + 11])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_masks_are_the_sum_of_whole_streams_at_every_length_and_number_of_threads(dtype, length, workers):
    keys = [(sign, bytes([number]) * 32) for number, sign in enumerate((1, -1, -1, 1, 1))]
    vector = np.arange(length, dtype=dtype)
    expected = vector.copy()
    for sign, key in keys:
        words = np.frombuffer(Keystream(key).read(vector.nbytes), dtype=vector.dtype.newbyteorder("<"))
        expected = expected + words if sign > 0 else expected - words
    apply_masks(vector, keys, workers=workers)
    assert (vector == expected).all()


def test_threads_that_fight_for_one_piece_lose_no_addition():
    """Forty threads over one chunk; an unguarded addition in place would drop some of them now and then."""
    keys = [(1, number.to_bytes(32, "big")) for number in range(400)]
    one, many = np.zeros(60_000, dtype=np.uint32), np.zeros(60_000, dtype=np.uint32)
    apply_masks(one, keys)
    apply_masks(many, keys, workers=40)
    assert (one == many).all()
