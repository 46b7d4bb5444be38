"""Every method sums the same clipped gradients, and one record moves the sum by at most the clip norm."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import SmallExample, clipped_sum, example_losses
from fedpt_secure.privacy.bookkeeping import bookkeeping_gradients
from fedpt_secure.privacy.clipped_sum import _GridSum

VOCABULARY, HIDDEN, INNER, HEADS, RANK = 64, 16, 32, 2, 2
METHODS = ("bookkeeping", "hooks", "ghost")
EXACT = ("bookkeeping", "hooks")
ALL_MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")


def small_lm(seed: int = 0, *, layers: int = 0, modules: tuple[str, ...] = ALL_MODULES) -> SmallLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    lora = LoraSettings(rank=RANK, layers=layers, modules=modules)
    small = SmallLM(base, lora, seed=seed, device=torch.device("cpu"))
    rng = np.random.default_rng(seed)
    small.load_adapter_vector(rng.normal(0, 0.1, small.dimension).astype(np.float32))
    return small


def examples(count: int, seed: int = 1) -> list[SmallExample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, n).tolist()), int(rng.integers(1, n))) for n in lengths]


def naive_gradients(small: SmallLM, data: list[SmallExample]) -> np.ndarray:
    """One backward pass an example, float64 `[n, d]`."""
    rows = []
    for example in data:
        gradients = torch.autograd.grad(example_losses(small, [example])[0], small.trainable)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).double())
    return torch.stack(rows).numpy()


def naive_sum(gradients: np.ndarray, clip_norm: float) -> np.ndarray:
    norms = np.linalg.norm(gradients, axis=1)
    return (gradients * np.minimum(1, clip_norm / norms)[:, None]).sum(0)


@pytest.mark.parametrize("entries", [1, 37, 1 << 15])
@pytest.mark.parametrize("clip_norm", [0.05, math.inf])
def test_a_vector_is_clipped_and_added_alike_in_parts_of_any_size(monkeypatch, entries, clip_norm):
    """In float64, norms differ by rounding alone, the sum by no more than the steps of its grid."""
    small, data = small_lm(), examples(9)
    whole = clipped_sum(small, data, clip_norm=clip_norm)
    monkeypatch.setattr(sys.modules[clipped_sum.__module__], "_PART", entries)
    parts = clipped_sum(small, data, clip_norm=clip_norm)
    assert np.allclose(parts.norms, whole.norms, rtol=1e-13)
    assert np.allclose(parts.vector, whole.vector, rtol=0, atol=9 * 0.05 * 2**-30 if clip_norm == 0.05 else 1e-12)
    gradients = naive_gradients(small, data)
    assert np.allclose(parts.vector, naive_sum(gradients, clip_norm), rtol=1e-3, atol=1e-6)


def test_of_a_vector_with_one_bad_entry_in_any_part_nothing_is_added(monkeypatch):
    monkeypatch.setattr(sys.modules[clipped_sum.__module__], "_PART", 4)
    for place, bad in itertools.product((0, 5, 9), (math.nan, math.inf, -math.inf)):
        total = _GridSum(10, 1.0)
        vectors = torch.ones(2, 10)
        vectors[0, place] = bad
        norms = total.add(vectors)
        assert math.isinf(norms[0])
        assert np.allclose(total.value(), 1 / math.sqrt(10), atol=1e-6)


def overflowing(small: SmallLM, size: float = 1e20) -> SmallLM:
    small.load_adapter_vector(np.where(np.arange(small.dimension) % 2, size, -size).astype(np.float32))
    return small


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("examples_per_pass", [1, 5, 64])
@pytest.mark.parametrize("layers", [0, 1])
def test_norms_and_sums_are_those_of_a_naive_loop(method, examples_per_pass, layers):
    small, data = small_lm(layers=layers), examples(17)
    gradients = naive_gradients(small, data)
    norms = np.linalg.norm(gradients, axis=1)
    for clip_norm in (0.01, float(np.median(norms)), 100.0):
        result = clipped_sum(small, data, clip_norm=clip_norm, method=method, examples_per_pass=examples_per_pass)
        assert np.allclose(result.norms, norms, rtol=1e-5, atol=0)
        expected = naive_sum(gradients, clip_norm)
        assert np.linalg.norm(result.vector - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_norm_over_one_matrix_alone_is_not_the_norm():
    """The broken variant: clipping each matrix by itself passes up to sqrt(matrices) times the clip norm."""
    small, data = small_lm(), examples(5)
    parts = np.cumsum([0, *(parameter.numel() for parameter in small.trainable)])
    gradients = naive_gradients(small, data)
    per_matrix = np.array([[np.linalg.norm(row[a:b]) for a, b in itertools.pairwise(parts)] for row in gradients])
    assert (per_matrix.max(axis=1) < 0.99 * clipped_sum(small, data, clip_norm=1.0).norms).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
def test_one_example_never_adds_more_than_the_clip_norm(method, scale):
    """However large its gradient: an adapter of adversarial size makes it so."""
    small, data, clip_norm = small_lm(), examples(8), 0.05
    small.load_adapter_vector(small.adapter_vector() * np.float32(scale))
    # Opacus's second backward pass sums in float32.
    rounding = 1e-5 if method == "ghost" else 0.0
    for example in data:
        alone = clipped_sum(small, [example], clip_norm=clip_norm, method=method)
        assert np.linalg.norm(alone.vector) <= clip_norm * (1 + rounding)
        if np.isfinite(alone.norms[0]) and alone.norms[0] > clip_norm:
            # The bound is tight, or a sum that ignores its data would pass.
            assert np.linalg.norm(alone.vector) >= clip_norm * 0.9999


@pytest.mark.parametrize("method", EXACT)
def test_one_record_moves_the_sum_by_its_own_clipped_gradient_to_the_last_bit(method):
    """With one example per pass sensitivity is exact in floating point: no rounding of the others comes on top."""
    small, data = small_lm(), examples(12)
    whole = clipped_sum(small, data, clip_norm=0.05, method=method).vector
    for index, example in enumerate(data):
        less = clipped_sum(small, data[:index] + data[index + 1 :], clip_norm=0.05, method=method).vector
        alone = clipped_sum(small, [example], clip_norm=0.05, method=method).vector
        assert np.array_equal(whole - less, alone)
        assert np.linalg.norm(whole - less) <= 0.05


def test_the_order_of_the_records_changes_no_bit():
    small, data = small_lm(), examples(20)
    forward, backward = (clipped_sum(small, order, clip_norm=0.05) for order in (data, data[::-1]))
    assert np.array_equal(forward.vector, backward.vector)
    assert np.array_equal(forward.norms, backward.norms[::-1])


def test_in_shared_passes_a_record_moves_the_gradients_of_others():
    """Why one example per pass is the default. One short record shifts the others to passes of other widths; rounding
    follows the width, and the sum moves by a little more than the record's own part."""
    small, data = small_lm(), examples(24)
    short = SmallExample((0, 1), 1)
    parts = [clipped_sum(small, world, clip_norm=0.05, examples_per_pass=8).vector for world in (data, [short, *data])]
    alone = clipped_sum(small, [short], clip_norm=0.05).vector
    assert not np.array_equal(parts[1] - parts[0], alone)
    assert np.linalg.norm(parts[1] - parts[0] - alone) < 24 * 0.05 * 1e-5


@pytest.mark.parametrize("examples_per_pass", [1, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e20, 1e37])
def test_gradients_that_are_not_finite_count_as_zero(method, size, examples_per_pass):
    small, data = overflowing(small_lm(), size), examples(6)
    result = clipped_sum(small, data, clip_norm=0.05, method=method, examples_per_pass=examples_per_pass)
    assert np.isfinite(result.vector).all()
    assert np.linalg.norm(result.vector) <= len(data) * 0.05 * (1 + 1e-5)
    assert np.isinf(result.norms).any()
    if np.isinf(result.norms).all():
        assert (result.vector == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_gradient_takes_no_other_along(method, monkeypatch):
    """One record's loss is infinite; the others in the same pass still count, and clipped as before."""
    small, data = small_lm(), examples(6)
    poison = data[2]
    honest = [example for example in data if example is not poison]
    clean = clipped_sum(small, honest, clip_norm=0.05, method=method, examples_per_pass=8)

    def poisoned(model, batch, *, positions=None):
        bad = torch.tensor([example is poison for example in batch])
        return example_losses(model, batch, positions=positions) * torch.where(bad, torch.inf, 1.0)

    for module in ("bookkeeping", "opacus_gradients"):
        monkeypatch.setattr(f"fedpt_secure.privacy.{module}.example_losses", poisoned)
    result = clipped_sum(small, data, clip_norm=0.05, method=method, examples_per_pass=8)
    assert np.isinf(result.norms).tolist() == [example is poison for example in data]
    assert np.allclose(result.vector, clean.vector, rtol=0, atol=1e-6)
    assert np.abs(clean.vector).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_sample_sums_to_zero(method):
    small = small_lm()
    result = clipped_sum(small, [], clip_norm=1.0, method=method)
    assert result.vector.shape == (small.dimension,)
    assert (result.vector == 0).all()
    assert result.norms.shape == (0,)


def test_an_infinite_clip_norm_does_not_clip():
    small, data = small_lm(), examples(6)
    gradients = naive_gradients(small, data)
    result = clipped_sum(small, data, clip_norm=math.inf)
    assert np.allclose(result.vector, gradients.sum(0), rtol=1e-5, atol=1e-7)
    # The broken mechanism: without clipping one record moves the sum by its whole norm.
    less = clipped_sum(small, data[:-1], clip_norm=math.inf)
    assert np.linalg.norm(result.vector - less.vector) > 2 * 0.05


@pytest.mark.parametrize("clip_norm", [0.0, 1e-300, -1.0, float("nan")])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip_norm):
    with pytest.raises(PrivacyError, match="clip_norm"):
        clipped_sum(small_lm(), examples(2), clip_norm=clip_norm)


@pytest.mark.parametrize("way", [{"examples_per_pass": 0}, {"examples_per_pass": -1}, {"method": "vmap"}])
def test_what_would_sum_nothing_is_refused(way):
    with pytest.raises(PrivacyError, match="way to sum"):
        clipped_sum(small_lm(), examples(2), clip_norm=1.0, **way)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method):
    small, data = small_lm(), examples(4)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    clipped_sum(small, data, clip_norm=0.05, method=method)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in small.trainable)
    assert not any(module._backward_hooks or module._forward_hooks for module in small.model.modules())
    assert not small.model.training


def test_nothing_is_differentiated_below_the_lowest_trained_layer():
    """Backward of the last down_proj's adapter alone: the head, and the product that is B's gradient; and these, as the
    head's and B's forward products, at the positions with loss only."""
    from torch.utils.flop_counter import FlopCounterMode

    small = small_lm(layers=1, modules=("down_proj",))
    example = examples(1)[0]
    positions = len(example.ids)

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = flops(lambda: example_losses(small, [example]))
    judged = positions - example.loss_from
    assert 0 < judged < positions
    head, matrix_b = 2 * HIDDEN * VOCABULARY, 2 * HIDDEN * RANK
    saved = (positions - judged) * (head + matrix_b)
    assert flops(lambda: clipped_sum(small, [example], clip_norm=0.05)) == forward - saved + judged * (head + matrix_b)


def test_a_layer_that_runs_twice_is_refused():
    """Its two gradients would have to be added before the norm is taken; the second must not replace the first."""
    small, data = small_lm(), examples(1)
    layer = small.model.base_model.model.model.layers[0].mlp
    down = layer.down_proj

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = down

        def forward(self, x):
            return self.inner(x) + self.inner(x)

    layer.down_proj = Twice()
    with bookkeeping_gradients(small) as gradients, pytest.raises(PrivacyError, match="runs twice"):
        gradients(data)


def test_a_trained_parameter_outside_a_linear_layer_is_refused():
    small = small_lm()
    small.trainable[0].requires_grad_(True)
    parameter = torch.nn.Parameter(torch.zeros(3))
    small._trainable.append(("extra", parameter))
    with pytest.raises(PrivacyError, match="linear"), bookkeeping_gradients(small):
        pass
