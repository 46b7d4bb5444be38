"""Parameters are refused unless they are secure, cannot wrap and are exact enough."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import CkksParameters, InsecureParameters, ParameterError
from fedpt_secure.crypto.ckks_parameters import LARGEST_MODULUS_BITS

SMALL = {"cohort": 5, "bound": 1.0, "length": 100}


def test_the_security_table_is_the_one_that_seal_took_from_the_standard():
    """SEAL keeps its own copy of the standard's table: a second source for every row."""
    sealapi = pytest.importorskip("tenseal.sealapi")
    level = sealapi.SEC_LEVEL_TYPE.TC128
    assert {degree: sealapi.CoeffModulus.MaxBitCount(degree, level) for degree in LARGEST_MODULUS_BITS} == (
        LARGEST_MODULUS_BITS
    )


@pytest.mark.parametrize(
    ("degree", "prime_bits"),
    [
        (4096, (60, 50)),
        (2048, (38, 17)),
        (8192, (60, 60, 60, 39)),
        (512, (20, 16)),
        (5000, (60, 20)),
        (65536, (60, 20)),
    ],
)
def test_less_than_128_bits_of_security_is_refused(degree, prime_bits):
    with pytest.raises(InsecureParameters):
        CkksParameters.fitted(**SMALL, degree=degree, prime_bits=prime_bits)


def test_the_last_prime_counts_for_security_though_not_for_the_sum():
    within = CkksParameters.fitted(**SMALL, prime_bits=(60, 49))
    assert sum(within.prime_bits) == LARGEST_MODULUS_BITS[4096]
    assert within.modulus_bits == 59
    with pytest.raises(InsecureParameters, match="110 bits"):
        CkksParameters.fitted(**SMALL, prime_bits=(60, 50))


@pytest.mark.parametrize(
    "changes",
    [
        {"prime_bits": (60,)},
        {"prime_bits": (61, 20)},
        {"prime_bits": (60, 15)},
        {"bound": 0.0},
        {"bound": math.inf},
        {"bound": math.nan},
        {"cohort": 0},
        {"cohort": 1 << 17},
        {"length": 0},
        {"flooding_bits": 15},
        {"flooding_bits": 41},
        {"prime_bits": (16, 16)},
        {"prime_bits": (40, 20)},
        {"flooding_bits": 40},
    ],
)
def test_parameters_that_make_no_sense_or_no_precision_are_refused(changes):
    with pytest.raises(ParameterError):
        CkksParameters.fitted(**SMALL | changes)


def test_a_scale_that_could_wrap_is_refused_and_the_fitted_one_is_the_largest_that_cannot():
    fitted = CkksParameters.fitted(**SMALL)
    assert 5 * 2.0**fitted.scale_bits < 2.0 ** (fitted.modulus_bits - 1)
    with pytest.raises(ParameterError, match="may wrap"):
        CkksParameters(**SMALL, scale_bits=fitted.scale_bits + 1)
    with pytest.raises(ParameterError, match="scale_bits"):
        CkksParameters(**SMALL, scale_bits=0)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5000), st.floats(1e-3, 1e3), st.integers(1, 1 << 22), st.integers(16, 30), st.sampled_from([17, 30])
)
def test_whatever_is_accepted_keeps_every_promise_it_states(cohort, bound, length, flooding_bits, last):
    try:
        parameters = CkksParameters.fitted(
            cohort=cohort, bound=bound, length=length, flooding_bits=flooding_bits, prime_bits=(60, last)
        )
    except ParameterError:
        return
    assert sum(parameters.prime_bits) <= LARGEST_MODULUS_BITS[parameters.degree]
    assert cohort * (bound * parameters.scale + 21.5) < 2.0**58
    # Pinsker: sensitivity / (2 deviation) bounds the statistical distance of two Gaussians that far apart.
    assert parameters.sensitivity / (2 * parameters.flooding_deviation) <= 2.0**-flooding_bits * (1 + 1e-12)
    assert math.log2(parameters.step).is_integer()
    assert 16 <= parameters.flooding_deviation / parameters.step < 32
    assert parameters.flooding_deviation < parameters.error_bound <= cohort * bound / 256
    assert parameters.ciphertexts * parameters.slots >= length > (parameters.ciphertexts - 1) * parameters.slots
