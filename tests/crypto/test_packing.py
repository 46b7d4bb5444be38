import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import MalformedMessage, ParameterError, ring_dtype
from fedpt_secure.crypto.packing import add_packed, pack, packed_size, reduce_in_place, unpack

BITS = st.integers(16, 64)


def _elements(length, ring_bits, seed=1):
    return np.random.default_rng(seed).integers(0, 1 << ring_bits, length, dtype=ring_dtype(ring_bits))


def _reference_pack(vector, ring_bits):
    """One big integer whose base-2^b digits are the elements, written little-endian."""
    number = sum(int(element) << (position * ring_bits) for position, element in enumerate(vector))
    return number.to_bytes(packed_size(len(vector), ring_bits), "little")


@settings(deadline=None, max_examples=150)
@given(BITS, st.integers(0, 40), st.integers(0, 2**32))
def test_packing_writes_exactly_b_bits_an_element_and_reads_them_back(ring_bits, length, seed):
    vector = _elements(length, ring_bits, seed)
    packed = pack(vector, ring_bits)
    assert packed == _reference_pack(vector, ring_bits)
    assert (unpack(packed, length, ring_bits) == vector).all()


@pytest.mark.parametrize("ring_bits", [16, 17, 24, 31, 32, 33, 40, 63, 64])
def test_long_vectors_cross_chunks_without_a_seam(ring_bits):
    vector = _elements(140_003, ring_bits)
    packed = pack(vector, ring_bits)
    assert len(packed) == packed_size(vector.size, ring_bits)
    assert (unpack(packed, vector.size, ring_bits) == vector).all()


@pytest.mark.parametrize("ring_bits", [16, 20, 32, 50, 64])
def test_adding_packed_vectors_is_addition_in_the_ring(ring_bits):
    one, other = _elements(1000, ring_bits, 1), _elements(1000, ring_bits, 2)
    total = one.copy()
    add_packed(total, pack(other, ring_bits), ring_bits)
    reduce_in_place(total, ring_bits)
    expected = (one.astype(object) + other.astype(object)) % (1 << ring_bits)
    assert (total.astype(object) == expected).all()


@pytest.mark.parametrize("ring_bits", [17, 20, 32, 33, 64])
def test_a_vector_of_another_length_is_refused_and_changes_nothing(ring_bits):
    total = _elements(101, ring_bits)
    before = total.copy()
    for length in (0, 100, 102):
        with pytest.raises(MalformedMessage):
            add_packed(total, pack(_elements(length, ring_bits), ring_bits), ring_bits)
    assert (total == before).all()


def test_unused_bits_must_be_zero():
    packed = bytearray(pack(_elements(3, 17), 17))
    packed[-1] |= 0x80
    with pytest.raises(MalformedMessage, match="unused bits"):
        unpack(bytes(packed), 3, 17)


@pytest.mark.parametrize("ring_bits", [15, 65, 0, -1])
def test_other_rings_are_refused(ring_bits):
    with pytest.raises(ParameterError):
        ring_dtype(ring_bits)
