"""The estimate of training's memory is above what autograd keeps, and not far above."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings, RunConfig, build
from fedpt_secure.errors import ConfigError
from fedpt_secure.federation.tiers import require_memory
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.memory import training_memory
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.training_compute import TrainingCompute
from fedpt_secure.privacy import SmallExample, example_loss
from fedpt_secure.privacy.bookkeeping import bookkeeping_gradients

LENGTH, LAYERS = 48, 3
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small_lm(*, modules=ALL, compute=TrainingCompute(cache_bytes=5_000)) -> SmallLM:  # noqa: B008
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(64), "tiny")
    lora = LoraSettings(rank=4, layers=0, modules=modules)
    return SmallLM(base, lora, seed=0, device=torch.device("cpu"), compute=compute)


def kept_for_backward(small: SmallLM, part: TrainedPart) -> int:
    """Bytes of distinct arrays, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in small.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    example = SmallExample(tuple(np.random.default_rng(0).integers(0, 64, LENGTH).tolist()), 1)
    with bookkeeping_gradients(small, part=part), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        loss = example_loss(small, example, part=part)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("lowest", range(LAYERS))
def test_the_backward_pass_keeps_no_more_than_estimated_and_not_much_less(lowest):
    small = small_lm()
    part = TrainedPart(frozenset({lowest}))
    kept = kept_for_backward(small, part)
    estimated = training_memory(small, part, context_length=LENGTH).backward
    assert kept <= estimated <= 2 * kept


def test_fewer_layers_keep_less_and_a_smaller_rank_does_not():
    small = small_lm()
    kept = [kept_for_backward(small, TrainedPart(frozenset({layer}))) for layer in range(LAYERS)]
    assert kept[0] > 1.4 * kept[1] > 1.4 * 1.4 * kept[2]
    assert kept_for_backward(small, WHOLE) == kept[0]
    assert kept_for_backward(small, TrainedPart(None, 1)) > 0.95 * kept[0]


def test_the_parts_add_up_and_copies_count():
    full, low = (
        training_memory(small_lm(compute=TrainingCompute(dtype, 5_000)), WHOLE, context_length=LENGTH)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert full.total == full.weights + full.kept + full.backward + full.working
    assert full.kept == 5_000
    assert low.weights == 1.5 * full.weights


def settings(memory_mb: int) -> RunConfig:
    tiers = [{"name": "big", "share": 0.5}, {"name": "phone", "share": 0.5, "layers": 1, "memory_mb": memory_mb}]
    return build(RunConfig, {"federation": {"tiers": tiers}, "lora": {"layers": 0}})


def test_a_run_that_would_pass_a_tiers_memory_is_refused():
    small = small_lm(compute=TrainingCompute(cache_bytes=20_000_000))
    require_memory(settings(30), small)
    with pytest.raises(ConfigError, match=r"tier 'phone' has 15 MB, but its training takes 2\d MB"):
        require_memory(settings(15), small)
