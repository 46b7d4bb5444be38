"""However a gradient is computed (lower precision, kept activations, some of the positions), one record moves the sum
by its own clipped gradient, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings, RunConfig, build
from fedpt_secure.errors import ConfigError, PrivacyError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.split import SplitLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.training_compute import TrainingCompute
from fedpt_secure.privacy import (
    DpSgdSettings,
    InsecureDeterministicRandom,
    SampledPositions,
    SecureRandom,
    SmallExample,
    clipped_client_update,
    clipped_sum,
    example_losses,
    sampled_gradient_sum,
    train_locally,
)

VOCABULARY, CLIP_NORM = 64, 0.05
COMPUTES = {
    "float32": TrainingCompute(),
    "bfloat16": TrainingCompute(torch.bfloat16),
    "bfloat16, kept": TrainingCompute(torch.bfloat16, 1 << 20),
    "bfloat16, kept in part": TrainingCompute(torch.bfloat16, 4_000),
}
COUNTS = np.arange(VOCABULARY)[::-1].copy()
ADAPTERS = {
    "last down_proj": (1, ("down_proj",), 0.0),
    "all of both layers": (0, ("q_proj", "o_proj", "down_proj"), 0.0),
    "last down_proj and the head's bias": (1, ("down_proj",), 0.5),
    "all of both layers and the head's bias": (0, ("q_proj", "o_proj", "down_proj"), 0.1),
}
POSITIONS = {"all": None, "sampled": SampledPositions(4, b"a key of 16 byte")}


def small_lm(compute: TrainingCompute, adapter: str = "last down_proj", **settings) -> SmallLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    layers, modules, output_bias = ADAPTERS[adapter]
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    lora = LoraSettings(rank=2, layers=layers, modules=modules, output_bias=output_bias)
    if output_bias:
        settings["class_counts"] = COUNTS
    small = SmallLM(base, lora, seed=0, device=torch.device("cpu"), compute=compute, **settings)
    small.load_adapter_vector(np.random.default_rng(0).normal(0, 0.1, small.dimension).astype(np.float32))
    return small


def examples(count: int, seed: int = 1) -> list[SmallExample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, n).tolist()), int(rng.integers(1, n))) for n in lengths]


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_record_moves_the_sum_by_its_own_clipped_gradient_to_the_last_bit(adapter, compute, positions):
    """Also where the other world kept other activations, or kept them in another order."""
    data = examples(8)

    def total(records):
        small = small_lm(compute, adapter)
        for world in (records[::-1], records):  # the second sum meets what the first one kept
            result = clipped_sum(small, world, clip_norm=CLIP_NORM, positions=positions).vector
        return result

    whole = total(data)
    for index, example in enumerate(data[:4]):
        moved = whole - total(data[:index] + data[index + 1 :])
        assert np.array_equal(moved, total([example]))
        assert 0 < np.linalg.norm(moved) <= CLIP_NORM


def test_in_shared_passes_bfloat16_moves_the_gradients_of_others_so_it_is_refused():
    """The broken variant: the refusal lifted, a record's arrival moves the others' part too."""
    small, data = small_lm(TrainingCompute(torch.bfloat16), "all of both layers"), examples(24)
    with pytest.raises(PrivacyError, match="share a pass"):
        clipped_sum(small, data, clip_norm=CLIP_NORM, examples_per_pass=8)
    small.compute = TrainingCompute()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [
            clipped_sum(small, world, clip_norm=CLIP_NORM, method="hooks", examples_per_pass=8).vector
            for world in (data, [SmallExample((0, 1), 1), *data])
        ]
        alone = clipped_sum(small, [SmallExample((0, 1), 1)], clip_norm=CLIP_NORM, method="hooks").vector
    assert np.linalg.norm(parts[1] - parts[0] - alone) > 1e-4 * CLIP_NORM


def test_a_choice_of_positions_that_looks_at_other_records_moves_more_than_one_clipped_gradient(monkeypatch):
    """The broken variant: one generator for the whole step, so that a record's arrival moves the others' choices."""
    shared = np.random.default_rng(0)

    def of(self, example):
        rows = len(example.ids) - example.loss_from
        return np.sort(shared.choice(rows, min(rows, self.count), replace=False))

    small, data, few = small_lm(TrainingCompute()), examples(12), SampledPositions(2, bytes(16))
    monkeypatch.setattr(SampledPositions, "of", of)
    sums = []
    for world in (data, data[1:]):
        shared = np.random.default_rng(0)
        sums.append(clipped_sum(small, world, clip_norm=CLIP_NORM, positions=few).vector)
    assert np.linalg.norm(sums[0] - sums[1]) > CLIP_NORM


def sampled_head_lm(compute, adapter="last down_proj"):
    """`small_lm` with a ranking, so that its head can be sampled."""
    return small_lm(compute, adapter, class_counts=COUNTS)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_under_a_sampled_softmax_one_record_moves_the_sum_by_its_own_clipped_gradient_to_the_last_bit(adapter, compute):
    data = examples(8)

    def total(records):
        small = sampled_head_lm(compute, adapter)
        classes = small.output_classes(VOCABULARY // 2, key=bytes(16))
        return clipped_sum(small, records, clip_norm=CLIP_NORM, classes=classes).vector

    whole = total(data)
    assert not np.array_equal(whole, clipped_sum(small_lm(compute, adapter), data, clip_norm=CLIP_NORM).vector)
    for index, example in enumerate(data[:4]):
        moved = whole - total(data[:index] + data[index + 1 :])
        assert np.array_equal(moved, total([example]))
        assert 0 < np.linalg.norm(moved) <= CLIP_NORM


OWN_CLASSES = ("last down_proj", "last down_proj and the head's bias")


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
@pytest.mark.parametrize("adapter", OWN_CLASSES)
def test_with_classes_by_the_record_it_moves_the_sum_by_its_own_clipped_gradient_to_the_last_bit(
    adapter, compute, positions
):
    """Also where the other world kept other likely classes, or kept them in another order."""
    data = examples(8)

    def total(records):
        small = small_lm(compute, adapter, classes_by="record")
        for world in (records[::-1], records):
            classes = small.output_classes(VOCABULARY // 2, key=bytes(16))
            result = clipped_sum(small, world, clip_norm=CLIP_NORM, classes=classes, positions=positions).vector
        return result

    whole = total(data)
    by_all = clipped_sum(small_lm(compute, adapter), data, clip_norm=CLIP_NORM, positions=positions).vector
    assert not np.array_equal(whole, by_all)
    for index, example in enumerate(data[:4]):
        moved = whole - total(data[:index] + data[index + 1 :])
        assert np.array_equal(moved, total([example]))
        assert 0 < np.linalg.norm(moved) <= CLIP_NORM


def test_classes_by_a_clients_other_records_would_move_more_than_one_clipped_gradient(monkeypatch):
    """The broken variant: all records take the likely classes of the client's first, so that its arrival moves them."""
    small, data = small_lm(TrainingCompute(), classes_by="record"), 8 * examples(60)
    newcomer = SmallExample((10, 20, 30), 1)
    classes, sums = small.output_classes(4, key=bytes(16)), []
    for world in ([newcomer, *data], data):
        firsts = torch.tensor(sorted(set(world[0].ids), reverse=True)[: classes.own])
        monkeypatch.setattr(SplitLM, "_likely_classes", lambda *_, firsts=firsts: firsts)
        sums.append(clipped_sum(small, world, clip_norm=CLIP_NORM, classes=classes).vector)
    assert np.linalg.norm(sums[0] - sums[1]) > CLIP_NORM


def test_with_nearly_all_classes_by_the_record_the_gradient_is_nearly_the_whole_heads():
    small, data = small_lm(TrainingCompute(), OWN_CLASSES[1], classes_by="record"), examples(20)
    whole = clipped_sum(small, data, clip_norm=1e3).vector
    errors = [
        np.linalg.norm(
            clipped_sum(small, data, clip_norm=1e3, classes=small.output_classes(n, key=b"k")).vector - whole
        )
        for n in (6, 24, VOCABULARY - 1)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05 * np.linalg.norm(whole)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name not in OWN_CLASSES])
def test_classes_by_the_record_are_refused_where_the_base_would_have_to_run_again(adapter):
    with pytest.raises(ConfigError, match="nothing but the last layer's down_proj"):
        small_lm(TrainingCompute(), adapter, classes_by="record").output_classes(6, key=b"")


@pytest.mark.parametrize("count", [0, 2, VOCABULARY, VOCABULARY + 1])
def test_numbers_of_classes_that_leave_no_rest_to_sample_are_refused(count):
    with pytest.raises(ConfigError, match=f"output_classes is {count}"):
        small_lm(TrainingCompute(), classes_by="record").output_classes(count, key=b"")


def test_a_choice_of_classes_that_looks_at_the_records_moves_more_than_one_clipped_gradient():
    """The broken variant: the draw keyed by the records, so that a record's arrival moves the others' gradients."""
    small, data = sampled_head_lm(TrainingCompute()), examples(60)
    sums = []
    for world in (data, data[1:]):
        classes = small.output_classes(4, key=bytes(repr(world), "utf-8"))
        sums.append(clipped_sum(small, world, clip_norm=CLIP_NORM, classes=classes).vector)
    assert np.linalg.norm(sums[0] - sums[1]) > CLIP_NORM


def test_each_step_draws_its_own_classes(monkeypatch):
    small, seen = sampled_head_lm(TrainingCompute()), []
    honest = SmallLM.output_classes

    def watched(self, count, *, key):
        seen.append((count, key))
        return honest(self, count, key=key)

    monkeypatch.setattr(SmallLM, "output_classes", watched)
    data, noise = examples(3), SecureRandom()
    settings = DpSgdSettings(
        steps=3, sampling_rate=1.0, clip_norm=1.0, noise_multiplier=1.0, normaliser=1.0, learning_rate=0.1, classes=4
    )
    train_locally(small, data, settings, noise=noise)
    sampled_gradient_sum(small, data, sampling_rate=1.0, clip_norm=1.0, noise=noise, classes=4)
    clipped_client_update(
        small, data, sampling_rate=1.0, steps=2, learning_rate=0.1, clip_norm=1.0, noise=noise, classes=4
    )
    assert [count for count, _ in seen] == [4] * 6
    assert len({key for _, key in seen}) == 6


@pytest.mark.parametrize("count", [0, 1, VOCABULARY, VOCABULARY + 1])
def test_numbers_of_classes_that_are_no_sample_are_refused(count):
    with pytest.raises(ConfigError, match=f"output_classes is {count}"):
        sampled_head_lm(TrainingCompute()).output_classes(count, key=b"")


def test_a_small_lm_without_a_ranking_is_refused_where_classes_are_asked_for():
    with pytest.raises(ConfigError, match="ranked by public text"):
        small_lm(TrainingCompute()).output_classes(4, key=b"")


@pytest.mark.parametrize("way", [{"method": "hooks"}, {"method": "ghost"}, {"examples_per_pass": 2}])
def test_ways_that_would_ignore_the_classes_are_refused(way):
    small = sampled_head_lm(TrainingCompute())
    with pytest.raises(PrivacyError, match="sampled softmax"):
        clipped_sum(small, examples(2), clip_norm=1.0, classes=small.output_classes(4, key=b""), **way)


@pytest.mark.parametrize("method", ["bookkeeping", "hooks", "ghost"])
@pytest.mark.parametrize("examples_per_pass", [1, 5])
def test_all_methods_look_at_the_same_positions(method, examples_per_pass):
    small, data = small_lm(TrainingCompute(), "all of both layers"), examples(9)
    positions = SampledPositions(3, b"another key of16")
    rows = []
    for example in data:
        chosen = torch.from_numpy(example.loss_from + positions.of(example))
        logits = small.model(torch.tensor([example.ids])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[chosen - 1], torch.tensor(example.ids)[chosen])
        gradients = torch.autograd.grad(loss, small.trainable)
        rows.append(torch.cat([part.flatten() for part in gradients]).double().numpy())
    norms = np.linalg.norm(rows, axis=1)
    result = clipped_sum(
        small,
        data,
        clip_norm=CLIP_NORM,
        method=method,
        examples_per_pass=examples_per_pass,
        positions=positions,
    )
    assert np.allclose(result.norms, norms, rtol=1e-5)
    expected = (np.array(rows) * np.minimum(1, CLIP_NORM / norms)[:, None]).sum(0)
    assert np.linalg.norm(result.vector - expected) <= 1e-5 * np.linalg.norm(expected)


def test_as_many_positions_as_there_are_is_all_of_them():
    small, data = small_lm(TrainingCompute()), examples(6)
    many = clipped_sum(small, data, clip_norm=CLIP_NORM, positions=SampledPositions(20, bytes(16)))
    assert np.array_equal(many.vector, clipped_sum(small, data, clip_norm=CLIP_NORM).vector)


def test_positions_are_chosen_uniformly_and_anew_with_every_key():
    """Chi-square over 2,000 keys, 3 of 10 rows: counts of rows without replacement vary less than the test allows for,
    so a false alarm has a chance below 1e-6."""
    example = SmallExample(tuple(range(12)), 2)
    counts = np.zeros(10)
    for key in range(2_000):
        chosen = SampledPositions(3, key.to_bytes(16, "little")).of(example)
        assert len(set(chosen.tolist())) == 3
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
    assert ((counts - 600) ** 2 / 600).sum() < chi2.ppf(1 - 1e-6, 9)


def test_the_sampled_loss_has_the_whole_losss_gradient_on_average():
    small, example = small_lm(TrainingCompute()), examples(1, seed=4)[0]
    gradients = [
        clipped_sum(small, [example], clip_norm=1e3, positions=SampledPositions(1, key.to_bytes(16, "little"))).vector
        for key in range(400)
    ]
    wanted = torch.autograd.grad(example_losses(small, [example])[0], small.trainable)
    wanted = torch.cat([part.flatten() for part in wanted]).numpy()
    error = np.mean(gradients, axis=0) - wanted
    spread = np.std(gradients, axis=0) / 20
    assert np.linalg.norm(error) < 3 * np.linalg.norm(spread)  # about 1 times it, on average
    assert np.linalg.norm(spread) < 0.3 * np.linalg.norm(wanted)


class Draws(InsecureDeterministicRandom):
    """Counts the keys that are drawn."""

    def __init__(self) -> None:
        super().__init__(0, "positions")
        self.keys: list[bytes] = []
        self.inside = False

    def random_bytes(self, count: int) -> bytes:
        content = super().random_bytes(count)
        if count == 16:
            self.keys.append(content)
        return content


def test_every_step_draws_its_own_key_from_the_clients_source():
    small, data, noise = small_lm(TrainingCompute()), examples(3), Draws()
    settings = DpSgdSettings(
        steps=3, sampling_rate=1.0, clip_norm=1.0, noise_multiplier=1.0, normaliser=1.0, learning_rate=0.1, positions=2
    )
    train_locally(small, data, settings, noise=noise)
    assert len(set(noise.keys)) == 3
    sampled_gradient_sum(small, data, sampling_rate=1.0, clip_norm=1.0, noise=noise, positions=2)
    assert len(set(noise.keys)) == 4


def test_no_positions_at_all_are_refused():
    settings = DpSgdSettings(
        steps=1, sampling_rate=1.0, clip_norm=1.0, noise_multiplier=1.0, normaliser=1.0, learning_rate=0.1, positions=0
    )
    with pytest.raises(PrivacyError, match="0 positions"):
        train_locally(small_lm(TrainingCompute()), examples(1), settings, noise=InsecureDeterministicRandom(0, "none"))
    with pytest.raises(ConfigError, match="sampled_positions"):
        build(RunConfig, {"training": {"sampled_positions": 0}})
    with pytest.raises(ConfigError, match="training_dtype"):
        build(RunConfig, {"models": {"training_dtype": "float16"}})
