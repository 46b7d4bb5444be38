import numpy as np
import pytest
from scipy import stats

from fedpt_secure.crypto import ParameterError
from fedpt_secure.crypto.prg import CHUNK_BYTES, Keystream, apply_masks

KEYS = [bytes([number]) * 32 for number in range(1, 6)]


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("length", [1, 7, 1000, CHUNK_BYTES // 4 + 3, CHUNK_BYTES + 5])
def test_a_mask_is_the_keystream_read_as_little_endian_words(dtype, length):
    vector = np.zeros(length, dtype=dtype)
    apply_masks(vector, [(1, KEYS[0])])
    stream = Keystream(KEYS[0]).read(length * vector.dtype.itemsize)
    assert vector.astype(vector.dtype.newbyteorder("<")).tobytes() == stream


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_number_of_workers_does_not_change_the_result(workers):
    start = np.arange(300_001, dtype=np.uint32)
    masks = [(1, KEYS[0]), (-1, KEYS[1]), (1, KEYS[2])]
    one, many = start.copy(), start.copy()
    apply_masks(one, masks)
    apply_masks(many, masks, workers=workers)
    assert (one == many).all()


def test_more_masks_than_streams_alive_at_once_are_all_applied():
    keys = [number.to_bytes(32, "big") for number in range(600)]
    vector = np.zeros(10, dtype=np.uint32)
    apply_masks(vector, [(1, key) for key in keys])
    expected = sum((np.frombuffer(Keystream(key).read(40), dtype="<u4") for key in keys), np.zeros(10, dtype=np.uint32))
    assert (vector == expected).all()


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_what_is_added_can_be_subtracted(dtype):
    start = np.arange(1000, dtype=dtype)
    vector = start.copy()
    apply_masks(vector, [(1, key) for key in KEYS])
    assert (vector != start).any()
    apply_masks(vector, [(-1, key) for key in KEYS])
    assert (vector == start).all()


def test_a_stream_can_be_entered_at_any_block():
    whole = Keystream(KEYS[0]).read(160)
    assert Keystream(KEYS[0], first_block=3).read(112) == whole[48:]


def test_a_mask_looks_uniform_and_owes_nothing_to_another_one():
    """Chi-square over 256 byte values, bits, and correlation of two masks; false alarm 1e-6 each, keys fixed."""
    one, other = np.zeros(100_000, dtype=np.uint32), np.zeros(100_000, dtype=np.uint32)
    apply_masks(one, [(1, KEYS[0])])
    apply_masks(other, [(1, KEYS[1])])
    octets = np.bincount(one.view(np.uint8), minlength=256)
    assert stats.chisquare(octets).pvalue > 1e-6
    assert stats.spearmanr(one, other).pvalue > 1e-6


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=np.int32),
        np.zeros(4, dtype=np.uint16),
        np.zeros(4, dtype=np.float64),
        np.zeros((2, 2), dtype=np.uint32),
        np.zeros(8, dtype=np.uint32)[::2],
    ],
    ids=["signed", "narrow", "real", "2-D", "strided"],
)
def test_other_arrays_are_refused(vector):
    with pytest.raises(ParameterError):
        apply_masks(vector, [(1, KEYS[0])])


def test_read_only_vectors_short_keys_and_no_workers_are_refused():
    frozen = np.zeros(4, dtype=np.uint32)
    frozen.flags.writeable = False
    for call in (
        lambda: apply_masks(frozen, [(1, KEYS[0])]),
        lambda: apply_masks(np.zeros(4, dtype=np.uint32), [(1, b"short")]),
        lambda: apply_masks(np.zeros(4, dtype=np.uint32), [(1, KEYS[0])], workers=0),
    ):
        with pytest.raises(ParameterError):
            call()
