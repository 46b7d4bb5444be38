"""A cut model computes what the whole one computes, and what it keeps changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import ConfigError
from fedpt_secure.lm import split as module
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.output_classes import draw_rest
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.split import SPLITTABLE
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.training_compute import EXACT_COMPUTE, TrainingCompute
from fedpt_secure.privacy import SmallExample, example_losses

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
}
CUTS = {  # layers, modules -> where the cut runs
    "through the last layer": (1, ("down_proj",)),
    "through a lower layer": (2, ("down_proj",)),
    "below a layer": (2, ("down_proj", "q_proj")),
    "below the last layer": (1, ("down_proj", "k_proj", "o_proj")),
    "below the lowest layer": (0, ("v_proj",)),
}
IDS = tuple(np.random.default_rng(3).integers(0, VOCABULARY, 14).tolist())


def small_lm(family="llama", cut="through the last layer", *, compute=EXACT_COMPUTE, base=None) -> SmallLM:
    torch.manual_seed(1)
    layers, modules = CUTS[cut]
    base = BaseLM(base or FAMILIES[family](), TokenMap.identity(VOCABULARY), "tiny")
    lora = LoraSettings(rank=2, layers=layers, modules=modules)
    small = SmallLM(base, lora, seed=0, device=torch.device("cpu"), compute=compute)
    small.load_adapter_vector(np.random.default_rng(0).normal(0, 0.3, small.dimension).astype(np.float32))
    return small


def gradient(small: SmallLM, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, small.trainable)])


def split_loss(small: SmallLM, ids=IDS, loss_from=3) -> torch.Tensor:
    return small.split.loss(ids, loss_from, torch.arange(len(ids) - loss_from))


def test_every_family_that_is_cut_is_tested():
    assert set(FAMILIES) == set(SPLITTABLE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_are_those_of_the_whole_model(family, cut):
    small = small_lm(family, cut)
    whole = example_losses(small, [SmallExample(IDS, 3)])[0]
    half = split_loss(small)
    assert torch.allclose(half, whole, rtol=1e-5)
    assert torch.allclose(gradient(small, half), gradient(small, whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_chosen_rows_are_those_predictions(cut):
    small = small_lm(cut=cut)
    rows = torch.tensor([0, 4, 9])
    logits = small.model(torch.tensor([IDS])).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[2 + rows], torch.tensor(IDS)[3 + rows])
    assert torch.allclose(small.split.loss(IDS, 3, rows), wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS)
def test_kept_activations_change_no_bit(cut, dtype):
    """Alone, after others, at another adapter: always what a model that keeps nothing computes."""
    kept, fresh = (small_lm(cut=cut, compute=TrainingCompute(dtype, size)) for size in (1 << 20, 0))
    others = [tuple(reversed(IDS)), IDS[:5], IDS]
    for scale in (1.0, -0.5):
        for small in (kept, fresh):
            small.load_adapter_vector(small.adapter_vector() * np.float32(scale))
        for ids in (IDS, *others, IDS):
            assert torch.equal(gradient(kept, split_loss(kept, ids)), gradient(fresh, split_loss(fresh, ids)))
    assert kept.split.cached_examples == 3
    assert fresh.split.cached_examples == fresh.split.cached_bytes == 0


def test_an_example_with_another_beginning_of_its_loss_is_another_one():
    small = small_lm(compute=TrainingCompute(cache_bytes=1 << 20))
    first, second = split_loss(small, loss_from=3), split_loss(small, loss_from=5)
    assert small.split.cached_examples == 2
    assert torch.equal(split_loss(small, loss_from=3), first)
    assert torch.equal(split_loss(small, loss_from=5), second)


def test_what_is_kept_never_passes_the_bound():
    bound = 3_000
    small = small_lm(compute=TrainingCompute(cache_bytes=bound))
    for shift in range(40):
        split_loss(small, (shift, *IDS))
    split = small.split
    assert 0 < split.cached_examples < 40
    assert split.cached_bytes == sum(split._kept.get(example).nbytes for example in split._kept) <= bound


@pytest.mark.parametrize("cut", CUTS)
def test_what_was_forgotten_takes_no_memory_and_comes_back_bit_for_bit(cut):
    small = small_lm(cut=cut, compute=TrainingCompute(cache_bytes=1 << 20))
    other = tuple(reversed(IDS))
    before = gradient(small, split_loss(small))
    split_loss(small, other)
    both = small.split.cached_bytes
    small.forget(IDS, 3)
    assert small.split.cached_examples == 1
    assert 0 < small.split.cached_bytes < both
    small.forget(IDS, 3)  # nothing is kept of it, and nothing happens
    assert torch.equal(gradient(small, split_loss(small)), before)
    assert small.split.cached_bytes == both
    small.forget(other, 3)
    small.forget(IDS, 3)
    assert small.split.cached_examples == small.split.cached_bytes == 0


@pytest.mark.parametrize("cut", ["through the last layer", "below a layer"])
@pytest.mark.parametrize("written", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_dropped_when_a_weight_below_changes(cut, written, dtype):
    kept, fresh = (small_lm(cut=cut, compute=TrainingCompute(dtype, size)) for size in (1 << 20, 0))
    before = split_loss(kept)
    split_loss(fresh)
    for small in (kept, fresh):
        with torch.no_grad():
            small.model.get_base_model().get_parameter(written).mul_(1.5)
    assert torch.equal(split_loss(kept), split_loss(fresh))
    assert not torch.equal(split_loss(kept), before)


def test_kept_activations_that_outlive_the_model_below_would_be_wrong(monkeypatch):
    """The broken variant: versions that never change."""
    small = small_lm(compute=TrainingCompute(cache_bytes=1 << 20))
    monkeypatch.setattr(module.SplitLM, "_frozen_parameters", lambda self: [])
    before = split_loss(small)
    with torch.no_grad():
        small.model.get_base_model().get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.5)
    assert torch.equal(split_loss(small), before)
    whole = example_losses(small, [SmallExample(IDS, 3)])[0]
    assert not torch.allclose(before, whole, rtol=1e-5)


def test_a_new_adapter_drops_nothing_where_it_lies_above_the_cut():
    small = small_lm(compute=TrainingCompute(cache_bytes=1 << 20))
    split_loss(small)
    small.load_adapter_vector(small.adapter_vector() * np.float32(2))
    small.split._run_below = None  # the activations are there
    whole = example_losses(small, [SmallExample(IDS, 3)])[0]
    assert torch.allclose(split_loss(small), whole, rtol=1e-5)


def own_classes_loss(small: SmallLM, ids=IDS, own=8) -> torch.Tensor:
    draw = draw_rest(VOCABULARY, own + own // 2, key=bytes(16))
    assert draw.own == own
    return small.split.loss(ids, 3, torch.arange(len(ids) - 3), draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_likely_classes_change_no_bit_and_are_those_of_the_untrained_model(dtype):
    kept, fresh = (small_lm(compute=TrainingCompute(dtype, size)) for size in (1 << 20, 0))
    for scale in (1.0, -3.0):
        for small in (kept, fresh):
            small.load_adapter_vector(small.adapter_vector() * np.float32(scale))
        for ids in (IDS, IDS[:7], IDS):
            losses = [own_classes_loss(small, ids) for small in (kept, fresh)]
            assert torch.equal(*losses)
            assert torch.equal(*(gradient(small, loss) for small, loss in zip((kept, fresh), losses, strict=True)))
    with kept.model.disable_adapter():
        mass = torch.softmax(kept.model(torch.tensor([IDS])).logits[0, 2:-1], dim=1).sum(0)
    wanted = set(mass.topk(30).indices.tolist()) | set(IDS[3:])
    (found,) = (kept.split._likely.get(example) for example in kept.split._likely if example[0] == IDS)
    assert set(IDS[3:]) & set(found.tolist())
    assert set(found.tolist()) <= wanted
    assert len(fresh.split._likely) == 0


def test_likely_classes_count_within_the_bound_are_forgotten_and_follow_their_number():
    small = small_lm(compute=TrainingCompute(cache_bytes=1 << 20))
    split_loss(small)
    without = small.split.cached_bytes
    first = own_classes_loss(small)
    assert small.split.cached_bytes == without + 8 * 4
    assert not torch.equal(own_classes_loss(small, own=16), first)
    assert small.split.cached_bytes == without + 16 * 4
    assert torch.equal(own_classes_loss(small), first)
    small.forget(IDS, 3)
    assert small.split.cached_bytes == 0
    assert torch.equal(own_classes_loss(small), first)


@pytest.mark.parametrize("written", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_likely_classes_are_dropped_when_a_weight_that_they_follow_from_changes(written):
    kept, fresh = (small_lm(compute=TrainingCompute(cache_bytes=size)) for size in (1 << 20, 0))
    for small in (kept, fresh):
        own_classes_loss(small)
        with torch.no_grad():
            values = small.model.get_base_model().get_parameter(written)
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(own_classes_loss(kept), own_classes_loss(fresh))


@pytest.mark.parametrize("cut", [name for name in CUTS if name != "through the last layer"])
def test_a_cut_that_does_not_know_the_untrained_model_refuses_classes_by_the_record(cut):
    small = small_lm(cut=cut)
    assert not small.split.knows_base
    with pytest.raises(ConfigError, match="classes by the record"):
        own_classes_loss(small)


@pytest.mark.parametrize("cut", CUTS)
def test_bfloat16_is_near(cut):
    low, full = (small_lm(cut=cut, compute=TrainingCompute(dtype)) for dtype in (torch.bfloat16, torch.float32))
    wanted = gradient(full, split_loss(full))
    found = gradient(low, split_loss(low))
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05


def test_other_families_run_whole():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    config.num_hidden_layers = 1
    lora = LoraSettings(rank=2, layers=0, modules=("c_fc",))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        small = SmallLM(
            BaseLM(GPT2LMHeadModel(config), TokenMap.identity(VOCABULARY), "tiny"),
            lora,
            seed=0,
            device=torch.device("cpu"),
        )
    assert small.split is None


def test_an_adapted_head_is_not_cut():
    """Its gradient needs the logits of a layer that is trained."""
    lora = LoraSettings(rank=2, layers=0, modules=("lm_head", "down_proj"))
    base = BaseLM(FAMILIES["llama"](), TokenMap.identity(VOCABULARY), "tiny")
    assert SmallLM(base, lora, seed=0, device=torch.device("cpu")).split is None


def test_a_cast_copy_shares_nothing_and_is_made_from_cast_weights(monkeypatch):
    """Copied first and cast then, the lower half would be held twice in float32 for a moment."""
    lower = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = [parameter.clone() for parameter in lower.parameters()]
    copied: list[torch.dtype] = []
    real = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", lambda own, memo: (copied.append(own.dtype), real(own, memo))[1]
    )
    cast = module._cast_copy(lower, torch.bfloat16)
    assert torch.float32 not in copied
    assert [parameter.dtype for parameter in cast.parameters()] == [torch.bfloat16] * 4
    for own, original, copy in zip(lower.parameters(), before, cast.parameters(), strict=True):
        assert torch.equal(own, original)
        assert torch.equal(copy, original.bfloat16())
        assert own.data_ptr() != copy.data_ptr()
