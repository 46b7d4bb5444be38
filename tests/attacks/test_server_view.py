"""What a server gets out of updates: everything from a bare one, nothing from a masked one, less from noised sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpt_secure.attacks.matching import CHANCE_BITS, matching_curves
from fedpt_secure.attacks.span import RANK, span_check
from fedpt_secure.attacks.uniformity import difference, uniformity_p_values


def unit_rows(rng, count, dimension, common):
    rows = rng.normal(size=(count, dimension)) + common
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def curves():
    rng = np.random.default_rng(2)
    common = rng.normal(size=1500)
    found = matching_curves(unit_rows(rng, 256, 1500, common), unit_rows(rng, 40, 1500, common), trials=40, rng=rng)
    return {(row["what"], row["clients"], row["sigma"]): row for row in found}


def test_a_bare_update_gives_every_bit_and_a_masked_one_no_more_than_a_guess(curves):
    bare, masked = curves["bare", 1, 0.0], curves["masked", 1, 0.0]
    assert bare["bits"]["value"] == bare["most_bits"] == math.log2(256)
    # Mean of ten guesses; each has standard deviation 1.44.
    assert masked["bits"]["value"] < CHANCE_BITS + 4 * 1.44 / math.sqrt(masked["trials"])


def test_a_sum_without_noise_is_no_privacy_and_noise_is(curves):
    assert curves["sum", 8, 0.0]["bits"]["value"] > 7
    bits = [curves["noised_sum", 8, sigma]["bits"]["value"] for sigma in (0.25, 1.0, 4.0)]
    assert bits[0] > bits[2]
    assert bits[2] < CHANCE_BITS + 4 * 1.44 / math.sqrt(40)


def test_the_span_check_finds_every_token_while_they_are_few_and_then_none_reliably():
    rows = span_check(np.random.default_rng(0))
    for row in rows:
        if row["unique_tokens"] < 3 * RANK - 2:
            assert row["found"] == row["unique_tokens"]
            assert row["false"] == 0
    assert rows[-1]["unique_tokens"] > 3 * RANK
    assert rows[-1]["found"] < rows[-1]["unique_tokens"]


def smallest(p_values):
    return min(p_values.values())


def test_uniform_samples_pass_and_narrow_repeated_and_constant_ones_do_not():
    rng = np.random.default_rng(1)
    good = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    plain = rng.normal(size=20_000)
    assert smallest(uniformity_p_values(good, 32, plain)) > 1e-6
    assert smallest(uniformity_p_values(good >> np.uint32(1), 32)) < 1e-12
    assert smallest(uniformity_p_values(np.resize(good[:500], 20_000), 32)) < 1e-12
    assert smallest(uniformity_p_values(np.zeros(20_000, dtype=np.uint32), 32)) == 0.0
    follows = good.astype(np.float64) + rng.normal(scale=2**33, size=20_000)
    assert uniformity_p_values(good, 32, follows)["order of the plaintext, Spearman"] < 1e-12


def test_a_mask_used_twice_cancels_in_the_difference():
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2**20, 5000, dtype=np.uint32)
    first, second = ((mask + plain) % 2**20 for plain in (7, 9))
    assert (difference(first.astype(np.uint32), second.astype(np.uint32), 20) == 2).all()
