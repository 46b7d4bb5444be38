"""One unit moves a client's vector by no more than the sensitivity that its noise is sized for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import (
    InsecureDeterministicRandom,
    QuantileClipping,
    SmallExample,
    client_vectors,
    clipped_client_update,
    clipped_sum,
    sampled_gradient_sum,
)

VOCABULARY = 32
QUANTILES = [None, QuantileClipping(0.5, 0.2, 0.2, 1e-6, 1e6), QuantileClipping(0.9, 0.2, 0.5, 1e-6, 1e6)]
ROUNDING = 1 + 1e-9


class Coins:
    """A noise source whose coins fall as the test says; the vectors need nothing else of it."""

    is_private = False

    def __init__(self, *heads):
        self._heads = np.array(heads)

    def bernoulli(self, count, *, probability):
        return np.resize(self._heads, count)


ALWAYS, NEVER = Coins(True), Coins(False)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    made = SmallLM(base, LoraSettings(rank=2), seed=0, device=torch.device("cpu"))
    made.load_adapter_vector(np.random.default_rng(0).normal(0, 0.1, made.dimension).astype(np.float32))
    return made


def records(count, seed=1):
    rng = np.random.default_rng(seed)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, 8).tolist()), 1) for _ in range(count)]


def unit_norm(quantile):
    return 1.0 if quantile is None else quantile.unit_norm


def gradient_sum(small, data, *, clip_norm, quantile=None, noise=ALWAYS):
    return sampled_gradient_sum(small, data, sampling_rate=0.5, clip_norm=clip_norm, noise=noise, quantile=quantile)


def client_update(small, data, *, clip_norm, quantile=None, noise=ALWAYS, steps=2, learning_rate=0.5):
    return clipped_client_update(
        small,
        data,
        sampling_rate=0.5,
        steps=steps,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        noise=noise,
        quantile=quantile,
    )


@pytest.fixture(scope="module")
def norms(small):
    """Of the gradients of `records(6)`."""
    return clipped_sum(small, records(6), clip_norm=1.0).norms


# Mode distributed.


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("position", ["below all", "in the middle", "above all"])
def test_one_record_moves_the_sum_by_at_most_the_unit_norm(small, norms, quantile, position):
    clip_norm = {"below all": norms.min() / 10, "in the middle": np.median(norms), "above all": norms.max() * 1.01}
    data = records(6)
    whole = gradient_sum(small, data, clip_norm=clip_norm[position], quantile=quantile)
    for index in range(6):
        without = gradient_sum(
            small, data[:index] + data[index + 1 :], clip_norm=clip_norm[position], quantile=quantile
        )
        alone = gradient_sum(small, [data[index]], clip_norm=clip_norm[position], quantile=quantile)
        for moved in (whole - without, alone):
            assert np.linalg.norm(moved) <= unit_norm(quantile) * ROUNDING
        if position != "above all":
            assert np.linalg.norm(whole - without) >= 1 - 1e-6 or norms[index] < clip_norm[position]


@pytest.mark.parametrize("quantile", QUANTILES[1:])
def test_the_unit_norm_is_attained_by_a_record_that_is_clipped_or_just_not(small, norms, quantile):
    """The dearer of the two signs of the indicator; a smaller unit norm would be false."""
    data = [records(6)[0]]
    clip_norm = float(norms[0]) * (1 - 1e-6 if quantile.quantile >= 0.5 else 1 + 1e-6)
    moved = gradient_sum(small, data, clip_norm=clip_norm, quantile=quantile)
    assert np.linalg.norm(moved) == pytest.approx(quantile.unit_norm, rel=1e-5)


@pytest.mark.parametrize("quantile", QUANTILES)
def test_no_records_give_zeros(small, quantile):
    assert not gradient_sum(small, [], clip_norm=1.0, quantile=quantile).any()
    assert not client_update(small, [], clip_norm=1.0, quantile=quantile).any()


def test_the_sum_is_over_the_sampled_records_only(small, norms):
    data = records(4)
    sampled = gradient_sum(small, data, clip_norm=1.0, noise=Coins(True, False, False, True))
    assert np.allclose(sampled, gradient_sum(small, [data[0], data[3]], clip_norm=1.0), rtol=0, atol=1e-12)
    assert not gradient_sum(small, data, clip_norm=1.0, noise=NEVER).any()


def test_the_indicator_counts_the_sampled_records_below_the_clip_norm(small, norms):
    quantile, clip_norm = QUANTILES[1], float(np.median(norms))
    vector = gradient_sum(small, records(6), clip_norm=clip_norm, quantile=quantile)
    assert vector.shape == (small.dimension + 1,)
    assert vector[-1] == pytest.approx(0.2 * ((norms <= clip_norm).sum() - 3))
    plain = gradient_sum(small, records(6), clip_norm=clip_norm)
    assert (vector[:-1] == plain).all()


def test_records_enter_the_sample_at_the_public_rate(small):
    """400 records at 0.25; 5 standard deviations, false alarm 6e-7 for another seed."""
    data = records(400)
    noise = InsecureDeterministicRandom(1, "sampling")
    quantile = QuantileClipping(0.5, 0.2, 1.0, 1e-6, 1e6)
    vector = sampled_gradient_sum(small, data, sampling_rate=0.25, clip_norm=1e-3, noise=noise, quantile=quantile)
    sampled = -vector[-1] / 0.5  # every gradient is longer than that
    assert abs(sampled - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_without_clipping_one_record_would_move_the_sum_further(small, norms, monkeypatch):
    """The broken variant."""
    honest = client_vectors.clipped_sum
    monkeypatch.setattr(
        client_vectors, "clipped_sum", lambda small, data, *, clip_norm, **_: honest(small, data, clip_norm=math.inf)
    )
    clip_norm = norms.min() / 10
    assert np.linalg.norm(gradient_sum(small, [records(6)[0]], clip_norm=clip_norm)) > 5


# Mode client.


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("clip_norm", [1e-4, 0.05, 1e3])
def test_a_client_in_place_of_nothing_moves_the_sum_by_at_most_the_unit_norm(small, quantile, clip_norm):
    """Its neighbour has no records; both take part, and both coins fall alike."""
    nothing = client_update(small, [], clip_norm=clip_norm, quantile=quantile)
    moved = client_update(small, records(5), clip_norm=clip_norm, quantile=quantile) - nothing
    assert np.linalg.norm(moved) <= unit_norm(quantile) * ROUNDING


@pytest.mark.parametrize("quantile", QUANTILES)
def test_another_record_moves_a_clients_update_by_at_most_twice_the_unit_norm(small, quantile):
    """What a record's budget is charged for a client's release (`privacy.budget.charge`)."""
    for clip_norm in (1e-4, 0.05):
        one = client_update(small, records(5), clip_norm=clip_norm, quantile=quantile)
        other = client_update(small, records(5)[:4], clip_norm=clip_norm, quantile=quantile)
        assert np.linalg.norm(one - other) <= 2 * unit_norm(quantile) * ROUNDING


def test_the_update_is_that_of_gradient_descent_on_the_mean_loss(small):
    data, before = records(5), small.adapter_vector()
    moved = np.zeros(small.dimension)
    try:
        for _ in range(3):
            moved -= 0.5 * clipped_sum(small, data, clip_norm=math.inf).vector / 5
            small.load_adapter_vector((before + moved).astype(np.float32))
    finally:
        small.load_adapter_vector(before)
    norm = np.linalg.norm(moved)
    whole = client_update(small, data, clip_norm=10 * norm, steps=3)
    assert np.allclose(whole, moved / (10 * norm), rtol=1e-12, atol=0)
    clipped = client_update(small, data, clip_norm=norm / 10, steps=3)
    assert np.allclose(clipped, moved / norm, rtol=1e-12, atol=0)
    assert np.linalg.norm(clipped) <= ROUNDING


@pytest.mark.parametrize("quantile", QUANTILES)
def test_a_client_whose_coin_fails_trains_all_the_same_and_contributes_zeros(small, quantile, monkeypatch):
    calls = []
    honest = client_vectors.clipped_sum
    monkeypatch.setattr(
        client_vectors, "clipped_sum", lambda *args, **kwargs: calls.append(1) or honest(*args, **kwargs)
    )
    vector = client_update(small, records(3), clip_norm=0.05, quantile=quantile, noise=NEVER, steps=4)
    assert len(calls) == 4
    assert not vector.any()
    assert vector.shape == (small.dimension + (quantile is not None),)


@pytest.mark.parametrize("noise", [ALWAYS, NEVER])
def test_the_adapter_is_put_back(small, noise):
    before = small.adapter_vector()
    client_update(small, records(3), clip_norm=0.05, noise=noise)
    assert (small.adapter_vector() == before).all()


@pytest.mark.parametrize("learning_rate", [1e60, 1e300])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_that_float32_cannot_hold_counts_as_zero(small, learning_rate, steps):
    """And does not stop the client: whether a run goes on must not depend on its records."""
    before = small.adapter_vector()
    assert not client_update(small, records(3), clip_norm=0.05, learning_rate=learning_rate, steps=steps).any()
    assert (small.adapter_vector() == before).all()


def test_without_the_clip_a_client_would_move_the_sum_further(small, monkeypatch):
    """The broken variant: the vector is in clip norms, and not cut to one."""
    monkeypatch.setattr(client_vectors, "max", lambda first, second: second, raising=False)
    assert np.linalg.norm(client_update(small, records(5), clip_norm=1e-4)) > 10
