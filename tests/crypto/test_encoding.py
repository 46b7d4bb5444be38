import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpt_secure.crypto import (
    EncodingError,
    FixedPointEncoding,
    InsecureDeterministicBytes,
    ParameterError,
    ring_dtype,
)


def _ring_sum(vectors, ring_bits):
    dtype = ring_dtype(ring_bits)
    total = np.zeros(len(vectors[0]), dtype=dtype)
    for vector in vectors:
        total += vector
    return total & dtype.type((1 << ring_bits) - 1)


@pytest.mark.parametrize("ring_bits", [16, 20, 32, 33, 48, 64])
@pytest.mark.parametrize("cohort", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("bound", [1e-6, 0.1, 1.0, 3.3, 1e9])
def test_the_sum_does_not_wrap_when_every_client_is_at_the_bound(ring_bits, cohort, bound):
    encoding = FixedPointEncoding(ring_bits=ring_bits, bound=bound, cohort=cohort)
    extremes = np.array([bound, -bound, bound * 1.5, -2 * bound])
    total = _ring_sum([encoding.encode(extremes) for _ in range(cohort)], ring_bits)
    decoded = encoding.decode_sum(total, survivors=cohort)
    assert decoded == pytest.approx(cohort * np.array([bound, -bound, bound, -bound]), rel=1e-9)


@settings(deadline=None, max_examples=200)
@given(st.integers(16, 64), st.integers(1, 70_000))
def test_the_scale_is_the_largest_that_cannot_wrap(ring_bits, cohort):
    half = 2 ** (ring_bits - 1)
    if (half - 1) // cohort < 1:
        with pytest.raises(ParameterError, match="without wrapping"):
            FixedPointEncoding(ring_bits=ring_bits, bound=1.0, cohort=cohort)
        return
    level = FixedPointEncoding(ring_bits=ring_bits, bound=1.0, cohort=cohort).level
    assert cohort * level < half
    assert level == 2**52 or cohort * (level + 1) >= half


def test_one_level_more_would_wrap():
    """The negative: with the level off by one, the worst case comes back with the wrong sign."""
    encoding = FixedPointEncoding(ring_bits=16, bound=1.0, cohort=3)
    total = np.zeros(1, dtype=np.uint32)
    for _ in range(3):
        total += np.uint32(encoding.level + 1)
    with pytest.raises(EncodingError):
        encoding.decode_sum(total & np.uint32(0xFFFF), survivors=3)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(20, 64),
    st.integers(1, 20),
    st.floats(1e-6, 1e6),
    st.lists(st.floats(-2, 2), min_size=1, max_size=20),
)
def test_each_coordinate_of_a_sum_is_within_a_step_a_client(ring_bits, clients, bound, relative):
    encoding = FixedPointEncoding(ring_bits=ring_bits, bound=bound, cohort=20)
    values = np.array(relative) * bound
    total = _ring_sum([encoding.encode(values) for _ in range(clients)], ring_bits)
    error = encoding.decode_sum(total, survivors=clients) - clients * np.clip(values, -bound, bound)
    slack = 1e-9 * clients * bound
    assert np.abs(error).max() <= clients / encoding.scale + slack


def test_rounding_is_unbiased_and_no_wider_than_a_coin():
    """z-test of the mean of 200,000 roundings, 60 values, |z| < 6: false alarm 60 x 2e-9 (seeded)."""
    encoding = FixedPointEncoding(ring_bits=16, bound=1.0, cohort=100)
    draw = InsecureDeterministicBytes(b"rounding")
    for fraction in np.linspace(0.0, 1.0, 20, endpoint=False):
        for whole in (-3, 0, 2):
            values = np.full(200_000, (whole + fraction) / encoding.scale)
            steps = encoding.decode_sum(encoding.encode(values, random_bytes=draw), survivors=1) * encoding.scale
            spread = math.sqrt(max(fraction * (1 - fraction), 1e-9) / len(values))
            assert abs(steps.mean() - (whole + fraction)) < 6 * spread + 1e-9
            assert set(np.round(steps)) <= {whole, whole + 1}


def test_rounding_to_nearest_would_be_caught():
    """The test above has teeth: deterministic rounding of a fraction of 0.3 is off by 0.3 of a step."""
    encoding = FixedPointEncoding(ring_bits=16, bound=1.0, cohort=100)
    values = np.full(200_000, 0.3 / encoding.scale)
    nearest = np.round(values * encoding.scale)
    assert abs(nearest.mean() - 0.3) > 6 * math.sqrt(0.3 * 0.7 / len(values))


def test_roundings_of_neighbouring_coordinates_are_independent():
    """Chi-square on pairs of roundings of 0.5; false alarm 1e-6 (seeded)."""
    encoding = FixedPointEncoding(ring_bits=16, bound=1.0, cohort=100)
    draw = InsecureDeterministicBytes(b"pairs")
    steps = encoding.encode(np.full(200_000, 0.5 / encoding.scale), random_bytes=draw)
    pairs = steps.reshape(-1, 2) @ np.array([2, 1], dtype=np.uint32)
    assert stats.chisquare(np.bincount(pairs, minlength=4)).pvalue > 1e-6


def test_two_encodings_of_one_vector_round_differently():
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=10)
    values = np.random.default_rng(0).uniform(-1, 1, 1000)
    assert (encoding.encode(values) != encoding.encode(values)).any()


def test_float32_and_float64_are_encoded_alike_and_long_vectors_in_pieces():
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=2)
    values = np.random.default_rng(0).uniform(-1, 1, 100_001).astype(np.float32)
    draws = [InsecureDeterministicBytes(b"same") for _ in range(2)]
    one = encoding.encode(values, random_bytes=draws[0])
    other = encoding.encode(values.astype(np.float64), random_bytes=draws[1])
    assert (one == other).all()


def test_clipped_coordinates_are_counted():
    encoding = FixedPointEncoding(ring_bits=32, bound=0.1, cohort=2)
    assert encoding.count_clipped(np.array([0.1, -0.1, 0.0, 0.11, -7.0])) == 2
    assert encoding.count_clipped(np.array([0.1], dtype=np.float32)) == 1  # float32(0.1) is above 0.1
    assert encoding.count_clipped(np.array([np.inf, -np.inf])) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_named(bad):
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=2)
    values = np.zeros(50_000)
    values[40_000] = bad
    with pytest.raises(EncodingError, match="coordinate 40000"):
        encoding.encode(values)


@pytest.mark.parametrize("values", [np.zeros(3, dtype=int), np.zeros((2, 2)), np.float64(1)])
def test_only_real_vectors_are_encoded(values):
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=2)
    with pytest.raises(EncodingError):
        encoding.encode(values)
    with pytest.raises(EncodingError):
        encoding.count_clipped(values)


@pytest.mark.parametrize(
    "parameters",
    [
        {"bound": 0.0},
        {"bound": -1.0},
        {"bound": math.nan},
        {"bound": math.inf},
        {"bound": 1e-320},
        {"cohort": 0},
        {"ring_bits": 16, "cohort": 40_000},
        {"ring_bits": 8},
    ],
    ids=str,
)
def test_parameters_that_could_not_hold_a_sum_are_refused(parameters):
    with pytest.raises(ParameterError):
        FixedPointEncoding(**{"ring_bits": 32, "bound": 1.0, "cohort": 10} | parameters)


def test_a_sum_that_no_honest_clients_can_reach_is_refused():
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=10)
    beyond = np.array([0, 3 * encoding.level + 1], dtype=np.uint32)
    with pytest.raises(EncodingError, match="coordinate 1"):
        encoding.decode_sum(beyond, survivors=3)
    with pytest.raises(EncodingError, match="coordinate 1"):
        encoding.decode_sum(np.uint32(0) - beyond, survivors=3)
    encoding.decode_sum(beyond, survivors=4)


@pytest.mark.parametrize("survivors", [0, 11])
def test_a_sum_of_more_vectors_than_the_cohort_is_refused(survivors):
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=10)
    with pytest.raises(EncodingError):
        encoding.decode_sum(np.zeros(1, dtype=np.uint32), survivors=survivors)


def test_a_sum_of_another_dtype_is_refused():
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=10)
    for wrong in (np.zeros(1), np.zeros(1, dtype=np.uint64), np.zeros((1, 1), dtype=np.uint32)):
        with pytest.raises(EncodingError):
            encoding.decode_sum(wrong, survivors=1)


@pytest.mark.parametrize("fraction", [1e-20, 1e-17, 1e-12])
def test_a_value_just_below_an_integer_is_rounded_to_it(fraction):
    """Its fraction is 1 in float64, or nearly; odds that wrap would send every such coordinate a whole step down.

    Over 50,000 coordinates, odds of 2^-31 each for another outcome: false alarm below 1e-4.
    """
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=2)
    encoded = encoding.encode(np.full(50_000, -fraction / encoding.scale))
    assert not encoded.any()
