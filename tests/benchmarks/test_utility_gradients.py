"""Shared passes give the sums of the product's own clipped sum, and draw positions as it does."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import DataError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import SmallExample, clipped_sum, example_losses

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VOCABULARY = 64
ADAPTERS = {
    "last down_proj": {"rank": 3, "layers": 1, "modules": ("down_proj",)},
    "last layer": {"rank": 2, "layers": 1, "modules": ("q_proj", "v_proj", "up_proj", "down_proj")},
    "all layers": {"rank": 2, "layers": 0, "modules": ("o_proj", "down_proj")},
    "last down_proj and the head's bias": {"rank": 3, "layers": 1, "modules": ("down_proj",), "output_bias": 0.2},
    "all layers and the head's bias": {"rank": 2, "layers": 0, "modules": ("o_proj",), "output_bias": 0.2},
}


@pytest.fixture(scope="module")
def gradients():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("utility_gradients")
    sys.modules.pop("utility_gradients", None)


def small_lm(adapter, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    small = SmallLM(
        base,
        LoraSettings(**ADAPTERS[adapter]),
        seed=0,
        device=torch.device("cpu"),
        class_counts=np.arange(VOCABULARY)[::-1].copy(),
        **settings,
    )
    small.load_adapter_vector(np.random.default_rng(0).normal(0, 0.1, small.dimension).astype(np.float32))
    return small


def examples(count):
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 20, count)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, n).tolist()), int(rng.integers(1, n))) for n in lengths]


def sums(gradients, small, data):
    return gradients.RecordSums(small, data, dtype=torch.float32, at_once=7)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clip_norm", [1e-3, 0.05, float("inf")])
def test_the_sum_is_that_of_one_record_at_a_time(gradients, adapter, clip_norm):
    small, data = small_lm(adapter), examples(30)
    chosen = np.array([3, 0, 29, 11, 12, 13, 14, 15, 16])
    expected = clipped_sum(small, [data[index] for index in chosen], clip_norm=clip_norm)
    vector, norms = sums(gradients, small, data).sum(
        chosen, clip_norm=clip_norm, positions=None, generator=torch.Generator()
    )
    assert norms == pytest.approx(expected.norms, rel=1e-4)
    assert vector == pytest.approx(expected.vector, abs=1e-5 * np.abs(expected.vector).max())
    assert all(parameter.requires_grad for parameter in small.trainable)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_follows_the_adapter_that_is_loaded(gradients, adapter):
    small, data = small_lm(adapter), examples(8)
    records = sums(gradients, small, data)
    small.load_adapter_vector(2 * small.adapter_vector())
    expected = clipped_sum(small, data, clip_norm=0.05).vector
    vector, _ = records.sum(np.arange(8), clip_norm=0.05, positions=None, generator=torch.Generator())
    assert vector == pytest.approx(expected, abs=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_the_models_own(gradients, adapter):
    small, data = small_lm(adapter), examples(9)
    logits = sums(gradients, small, data).logits([4, 2])
    with torch.no_grad():
        for index, part in zip(
            (4, 2), logits.split([len(data[i].ids) - data[i].loss_from for i in (4, 2)]), strict=True
        ):
            example = data[index]
            whole = small.model(input_ids=torch.tensor([example.ids])).logits[0]
            assert torch.allclose(part, whole[example.loss_from - 1 : -1], atol=1e-5)


def test_texts_have_the_losses_of_their_examples(gradients):
    small, data = small_lm("last layer"), examples(9)
    ids, targets = sums(gradients, small, data).texts(np.array([8, 1]))
    with torch.no_grad():
        logits = small.model(input_ids=ids).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        expected = example_losses(small, [data[8], data[1]])
    assert torch.allclose(losses.view(2, -1).sum(1) / (targets >= 0).sum(1), expected, atol=1e-5)


def test_positions_are_drawn_without_replacement_from_the_records_own_and_each_alike(gradients):
    small, data = small_lm("last down_proj"), examples(12)
    records, generator = sums(gradients, small, data), torch.Generator().manual_seed(5)
    index = torch.arange(12)
    drawn = np.zeros((12, 20))
    for _ in range(600):
        rows, counted = records._drawn(index, 4, generator)
        for record, (row, counts) in enumerate(zip(rows.tolist(), counted.tolist(), strict=True)):
            kept = [place for place, count in zip(row, counts, strict=True) if count]
            assert len(set(kept)) == len(kept) == min(4, int(records.rows[record]))
            drawn[record, kept] += 1
    for record in range(12):
        available = int(records.rows[record])
        share = min(4, available) / available
        # A binomial count is off by more than 5 standard deviations with probability 6e-7; 240 of them.
        spread = np.sqrt(600 * share * (1 - share))
        assert np.abs(drawn[record, :available] - 600 * share).max() <= 5 * spread
        assert drawn[record, available:].sum() == 0


def test_more_positions_than_there_are_change_nothing(gradients):
    small, data = small_lm("last down_proj"), examples(12)
    records = sums(gradients, small, data)
    whole, _ = records.sum(np.arange(12), clip_norm=1.0, positions=None, generator=torch.Generator())
    same, _ = records.sum(np.arange(12), clip_norm=1.0, positions=64, generator=torch.Generator())
    fewer, _ = records.sum(np.arange(12), clip_norm=1.0, positions=2, generator=torch.Generator())
    assert np.array_equal(whole, same)
    assert not np.allclose(whole, fewer)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_under_a_sampled_softmax_too_the_sum_is_that_of_one_record_at_a_time(gradients, adapter, monkeypatch):
    """With one draw for all passes on both sides."""
    small, data = small_lm(adapter), examples(12)
    classes = small.output_classes(16, key=bytes(16))
    expected = clipped_sum(small, data, clip_norm=0.05, classes=classes)
    monkeypatch.setattr(SmallLM, "output_classes", lambda self, count, *, key: classes)
    vector, norms = sums(gradients, small, data).sum(
        np.arange(12), clip_norm=0.05, positions=None, classes=16, generator=torch.Generator()
    )
    assert norms == pytest.approx(expected.norms, rel=1e-4)
    assert vector == pytest.approx(expected.vector, abs=1e-5 * np.abs(expected.vector).max())


@pytest.mark.parametrize("positions", [None, 4])
@pytest.mark.parametrize("adapter", ["last down_proj", "last down_proj and the head's bias"])
def test_with_classes_by_the_record_too_the_sum_is_that_of_one_record_at_a_time(
    gradients, adapter, positions, monkeypatch
):
    small, data = small_lm(adapter, classes_by="record"), examples(12)
    draw, records = small.output_classes(15, key=bytes(16)), sums(gradients, small, data)
    chosen, generator = np.array([7, 2, 3, 11, 0, 1, 5, 4]), torch.Generator().manual_seed(2)
    monkeypatch.setattr(SmallLM, "output_classes", lambda self, count, *, key: draw)
    asked = {"clip_norm": 0.05, "classes": 15}
    vector, norms = records.sum(chosen, positions=positions, generator=generator, **asked)
    assert np.isfinite(norms).all()
    if positions is None:
        expected = clipped_sum(small, [data[index] for index in chosen], clip_norm=0.05, classes=draw)
        assert norms == pytest.approx(expected.norms, rel=1e-4)
        assert vector == pytest.approx(expected.vector, abs=1e-5 * np.abs(expected.vector).max())
    whole, _ = records.sum(chosen, positions=positions, generator=generator, clip_norm=0.05)
    assert not np.allclose(vector, whole, rtol=1e-3)


def test_classes_by_the_record_want_activations_that_no_adapter_has_moved(gradients, monkeypatch):
    draw = small_lm("last down_proj", classes_by="record").output_classes(15, key=bytes(16))
    small, data = small_lm("all layers"), examples(4)
    monkeypatch.setattr(SmallLM, "output_classes", lambda self, count, *, key: draw)
    with pytest.raises(DataError, match="no adapter has moved"):
        sums(gradients, small, data).sum(
            np.arange(4), clip_norm=1.0, positions=None, classes=15, generator=torch.Generator()
        )


def test_every_pass_draws_its_own_classes(gradients, monkeypatch):
    small, data = small_lm("last down_proj"), examples(12)
    keys, honest = [], SmallLM.output_classes

    def watched(self, count, *, key):
        keys.append(key)
        return honest(self, count, key=key)

    monkeypatch.setattr(SmallLM, "output_classes", watched)
    sums(gradients, small, data).sum(
        np.arange(12), clip_norm=1.0, positions=None, classes=16, generator=torch.Generator().manual_seed(1)
    )
    assert len(set(keys)) == 2
