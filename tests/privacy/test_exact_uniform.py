"""A lazily drawn uniform number is compared with exp(-a / b) as if all its bits were known."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedpt_secure.privacy import InsecureDeterministicRandom
from fedpt_secure.privacy import exact_uniform as module
from fedpt_secure.privacy.exact_uniform import LazyUniform

FALSE_ALARM = 1e-6
FRACTIONS = [(0, 1), (1, 1), (1, 3), (7, 2), (31, 10), (1 << 40, (1 << 41) + 1), (40, 1), (3, 1 << 44)]


def scripted(*values):
    """Words in the given order; running out of them is an error."""
    rest = list(values)

    def words(size):
        taken, rest[:size] = rest[:size], []
        assert len(taken) == size, "more words were drawn than the decision needs"
        return np.array(taken, dtype=np.uint64)

    return words


def by_series(numerator, denominator, bits):
    """2^bits exp(-x) between two fractions: 1 / (the exponential series of x, its remainder bounded)."""
    x, term, total, k = Fraction(numerator, denominator), Fraction(1), Fraction(1), 0
    while k < 2 * x + 2 or term * (1 << (bits + 80)) > 1:
        k += 1
        term *= x / k
        total += term
    return (1 << bits) / (total + 2 * term), (1 << bits) / total


@pytest.mark.parametrize(("numerator", "denominator"), FRACTIONS)
@pytest.mark.parametrize("bits", [8, 117, 300])
def test_the_bounds_hold_the_exponential_and_are_close(numerator, denominator, bits):
    least, most = module._scaled_exp(numerator, denominator, bits)
    low, high = by_series(numerator, denominator, bits)
    assert least <= low
    assert high <= most
    assert most - least <= 3


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 5), (1, 1), (1, 2), (2, 3), (7, 2), (4, 1)])
def test_it_is_below_with_probability_exp_of_minus_the_fraction(numerator, denominator):
    """From no known bit on; a binomial test."""
    words = InsecureDeterministicRandom(1, "lazy uniform")._words
    draws = 4000
    below = sum(LazyUniform(0, 0, words).below_exp(numerator, denominator) for _ in range(draws))
    assert binomtest(below, draws, math.exp(-numerator / denominator)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("further", [0, 1, 3])
def test_it_draws_no_more_bits_than_the_decision_needs(further):
    """Numbers that agree with exp(-1) in 44 bits and `further` words, and differ in the word after them."""
    with localcontext() as context:
        context.prec = 200
        digits = int(Decimal(-1).exp() * (1 << (44 + 64 * (further + 1))))
    known = digits >> 64 * (further + 1)
    words = [digits >> 64 * (further - k) & (2**64 - 1) for k in range(further + 1)]
    for change, below in ((-1, True), (1, False)):
        rest = [*words[:-1], words[-1] + change]
        assert LazyUniform(known, 44, scripted(*rest)).below_exp(1, 1) is below
    assert LazyUniform(known - 1, 44, scripted()).below_exp(1, 1) is True
    assert LazyUniform(known + 1, 44, scripted()).below_exp(1, 1) is False


@given(st.integers(0, 2**20 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=9, max_size=9))
def test_comparisons_of_one_number_agree_with_each_other(prefix, rest):
    """It is below a threshold exactly if it is below all larger ones; a second answer is the first one."""
    number = LazyUniform(prefix, 20, scripted(*rest))
    answers = [number.below_exp(k, 2) for k in range(25)]
    assert answers == sorted(answers, reverse=True)
    assert answers == [number.below_exp(k, 2) for k in range(25)]


@given(st.integers(1, 2**53 - 1), st.integers(5, 20), st.integers(20, 60), st.integers(0, 2**64 - 1))
def test_thresholds_are_counted_from_any_known_number_of_them(prefix, numerator, denominator, following):
    def number():
        return LazyUniform(prefix, 53, lambda size: np.full(size, following, dtype=np.uint64))

    count = number().thresholds_above(numerator, denominator, known=0)
    fewest, most = (-math.log(edge * 2**-53) * denominator / numerator for edge in (prefix + 1, prefix))
    assert math.floor(fewest - 1e-9) <= count <= math.floor(most + 1e-9)
    for known in (count, max(0, count - 1), count // 2):
        assert number().thresholds_above(numerator, denominator, known=known) == count
