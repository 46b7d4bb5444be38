"""A bias of the head's classes: one number a class beside LoRA, trained in public units, and PEFT's own on disk."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import ConfigError, PrivacyError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.output_bias import FLOOR, class_units
from fedpt_secure.lm.part import TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import SmallExample, clipped_sum, example_losses
from fedpt_secure.privacy.bookkeeping import bookkeeping_gradients
from fedpt_secure.privacy.opacus_gradients import hook_gradients
from fedpt_secure.proxy import AdapterPair
from fedpt_secure.proxy.adapter_pair import adapter_off

VOCABULARY = 40
COUNTS = np.array([1000, 300, *range(38)])
EXAMPLES = [SmallExample((1, 5, 9, 9, 2), 1), SmallExample((1, 7, 9, 30, 31, 5, 0), 3)]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=True, **shape)
    return LlamaForCausalLM(config)


def small_lm(output_bias=0.1, counts=COUNTS, public=None, **lora) -> SmallLM:
    base = BaseLM(base_model(), TokenMap.identity(VOCABULARY), "tiny", public)
    settings = LoraSettings(**({"rank": 2, "output_bias": output_bias} | lora))
    return SmallLM(base, settings, seed=0, device=torch.device("cpu"), class_counts=counts)


def vector_of(small: SmallLM, seed=0):
    return np.random.default_rng(seed).normal(0, 0.3, small.dimension).astype(np.float32)


def logits(model, ids=(1, 4, 7)) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_units_fall_with_a_classes_frequency_down_to_the_floor_and_are_powers_of_two():
    units = class_units(COUNTS, 0.1)
    exact = 0.1 / np.sqrt(COUNTS / COUNTS.sum() + FLOOR)
    assert np.abs(np.log2(units.numpy() / exact)).max() <= 0.5
    assert torch.equal(units.log2(), units.log2().round())
    assert units.argmin() == 0
    assert units.argmax() == 2


def test_the_vector_has_one_entry_more_for_each_class_and_no_bias_leaves_all_as_it_was():
    without, with_bias = small_lm(0.0), small_lm()
    assert with_bias.dimension == without.dimension + VOCABULARY
    assert small_lm(0.0, counts=None).digest == without.digest
    assert with_bias.digest != without.digest


def test_a_fresh_adapter_changes_nothing():
    assert torch.equal(logits(small_lm().model), logits(base_model()))
    layer = "model.layers.1.mlp.down_proj"
    public = small_lm(public=Directions({layer: torch.eye(32)[:2]}, {layer: torch.ones(2)}))
    assert public.directions == "public"
    assert torch.equal(logits(public.model), logits(base_model()))


def test_the_vector_comes_back_to_the_last_bit():
    small = small_lm()
    vector = vector_of(small)
    small.load_adapter_vector(vector)
    assert np.array_equal(small.adapter_vector(), vector)


def test_an_entry_moves_its_class_by_its_unit_at_every_position_and_no_other():
    small, entry = small_lm(), 7
    vector = np.zeros(small.dimension, dtype=np.float32)
    vector[entry] = 3.0  # the head comes before the layers
    small.load_adapter_vector(vector)
    moved = logits(small.model) - logits(base_model())
    expected = torch.zeros(VOCABULARY)
    expected[entry] = 3 * class_units(COUNTS, 0.1)[entry]
    assert torch.allclose(moved, expected.expand_as(moved), atol=1e-6)


def test_the_base_is_without_it():
    small = small_lm()
    small.load_adapter_vector(vector_of(small))
    tuned = logits(small.model)
    with adapter_off(small.model):
        assert torch.equal(logits(small.model), logits(base_model()))
    assert torch.equal(logits(small.model), tuned)
    assert not torch.allclose(tuned, logits(base_model()))


@pytest.mark.parametrize("one_pass", [True, False])
def test_base_and_tuned_are_scored_as_by_the_model_itself(one_pass):
    small, ids = small_lm(), (1, 4, 7, 2)
    small.load_adapter_vector(vector_of(small))
    pair = AdapterPair(small.model, small.token_map, one_pass=one_pass)
    assert (pair._folded is not None) == one_pass
    ((base, tuned),) = pair.score([ids])
    assert torch.allclose(tuned, torch.log_softmax(logits(small.model, ids), -1), atol=1e-5)
    assert torch.allclose(base, torch.log_softmax(logits(base_model(), ids), -1), atol=1e-5)


def test_peft_loads_what_is_saved(tmp_path):
    small = small_lm()
    small.load_adapter_vector(vector_of(small))
    small.save_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base_model(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(small.model))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("modules", [("down_proj",), ("q_proj", "down_proj")])
def test_gradients_are_those_of_the_whole_models_loss_by_the_vectors_entries(layers, modules):
    """By finite differences of the loss as a function of `adapter_vector`, and by Opacus's hooks."""
    small = small_lm(layers=layers, modules=modules)
    vector = vector_of(small).astype(np.float64)
    small.load_adapter_vector(vector.astype(np.float32))
    with bookkeeping_gradients(small) as gradients:
        one_by_one = torch.cat([gradients([example]) for example in EXAMPLES])
        together = gradients(EXAMPLES)
    with hook_gradients(small) as gradients:
        by_opacus = gradients(EXAMPLES)
    assert torch.allclose(one_by_one, together, rtol=1e-3, atol=1e-5)
    assert torch.allclose(by_opacus, together, rtol=1e-3, atol=1e-5)
    for entry in (0, 9, 30, VOCABULARY, small.dimension - 1):
        sides = []
        for step in (-1e-2, 1e-2):
            moved = vector.copy()
            moved[entry] += step
            small.load_adapter_vector(moved.astype(np.float32))
            with torch.no_grad():
                sides.append(example_losses(small, EXAMPLES))
        difference = (sides[1] - sides[0]) / 2e-2
        assert torch.allclose(difference, one_by_one[:, entry], rtol=3e-2, atol=1e-4)


def test_gradients_that_forget_the_units_are_others():
    """The broken variant."""
    small = small_lm()
    with bookkeeping_gradients(small) as gradients:
        right = gradients(EXAMPLES[:1])
        small._units = [None] * len(small._units)
        wrong = gradients(EXAMPLES[:1])
    assert torch.allclose(right[:, VOCABULARY:], wrong[:, VOCABULARY:])
    assert not torch.allclose(right[:, :VOCABULARY], wrong[:, :VOCABULARY], rtol=0.1)


def test_a_part_holds_the_bias_whatever_its_layers_and_rank():
    small = small_lm(layers=2)
    for part in (TrainedPart(frozenset({1}), 1), TrainedPart(frozenset({0})), TrainedPart(None, 2)):
        held = small.coordinates(part)
        assert held[:VOCABULARY].all()
        vector = clipped_sum(small, EXAMPLES, clip_norm=1.0, part=part).vector
        assert not vector[~held].any()
        assert vector[:VOCABULARY].all()


def test_an_adapter_of_the_head_is_trained_as_any_other():
    small = small_lm(0.0, modules=("lm_head",), layers=0)
    assert small.trained_names == ["base_model.model.lm_head.lora_B.default.weight"]
    layer = "model.layers.1.mlp.down_proj"
    elsewhere = Directions({layer: torch.eye(32)[:2]}, {layer: torch.ones(2)})
    # Not quietly made a random one.
    with pytest.raises(ConfigError, match="lm_head"):
        small_lm(0.0, modules=("lm_head",), layers=0, directions="public", public=elsewhere)


def test_ghost_clipping_is_refused():
    with pytest.raises(PrivacyError, match="ghost"):
        clipped_sum(small_lm(), EXAMPLES, clip_norm=1.0, method="ghost")


def test_what_cannot_have_a_bias_is_refused():
    with pytest.raises(ConfigError, match="frequency"):
        small_lm(counts=None)
    with pytest.raises(ConfigError, match="other classes"):
        small_lm(counts=COUNTS[:-1])
    with pytest.raises(ConfigError, match="linear layer called absent"):
        small_lm(modules=("absent",))
    with pytest.raises(ConfigError, match="without an adapter of its own"):
        small_lm(modules=("down_proj", "lm_head"))
