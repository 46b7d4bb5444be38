"""Weights in one byte each: near what they were, read back exactly, and nothing else is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.base import load_builtin_weights
from fedpt_secure.lm.compact_weights import compact, expand, expanded
from fedpt_secure.lm.vocabulary import Vocabulary

LARGEST_SCALED = 127 * 65504.0
SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24

# Rows of all magnitudes: from too small for float16's smallest scale to the largest that has one.
exponents = arrays.arrays(np.int32, st.tuples(st.integers(1, 5), st.just(1)), elements=st.integers(-40, 22))
fractions = arrays.arrays(
    np.float32, st.tuples(st.just(5), st.integers(1, 7)), elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)
weights = st.builds(
    lambda rows, scale: torch.from_numpy(np.ldexp(rows[: len(scale)], scale).astype(np.float32)), fractions, exponents
)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@given(weights)
def test_every_entry_is_off_by_at_most_half_of_its_rows_stored_scale(weight):
    tensors = compact({"w": weight})
    step = tensors["w.scale"].double()[:, None]
    # A row with scale 0 has no entry as large as half of the smallest scale.
    half = torch.where(step == 0, SMALLEST, step) / 2
    assert ((expand(tensors)["w"].double() - weight.double()).abs() <= half).all()


@given(weights)
def test_the_stored_scale_is_the_largest_magnitude_over_127_as_float16_or_a_power_of_two_below_its_normal_numbers(
    weight,
):
    largest = weight.double().abs().amax(1).tolist()
    for scale, magnitude in zip(compact({"w": weight})["w.scale"].tolist(), largest, strict=True):
        exact = magnitude / 127
        if exact >= SMALLEST_NORMAL:
            assert scale == np.float16(np.float32(exact))
        elif scale:
            assert np.frexp(scale)[0] == 0.5
            assert exact <= scale <= max(2 * exact, SMALLEST)
        else:
            assert magnitude <= SMALLEST / 2


@given(weights)
def test_what_was_rounded_is_rounded_to_itself(weight):
    once = compact({"w": weight})
    assert same(compact(expand(once)), once)


@given(weights)
def test_rounding_does_not_look_at_signs_or_other_rows(weight):
    tensors, opposite = compact({"w": weight}), compact({"w": -weight})
    assert torch.equal(tensors["w"], -opposite["w"])
    assert torch.equal(tensors["w.scale"], opposite["w.scale"])
    assert same(compact({"w": weight[:1]}), {name: tensor[:1] for name, tensor in tensors.items()})


def test_rows_with_extreme_scales_keep_what_float16_allows():
    rows = torch.tensor([[0.0, 0.0], [LARGEST_SCALED, -1.0], [127 * SMALLEST, SMALLEST], [1e-9, -1e-9], [3e-4, 1e-5]])
    tensors = compact({"w": rows})
    assert tensors["w"].tolist() == [[0, 0], [127, 0], [127, 1], [0, 0], [79, 3]]
    assert tensors["w.scale"].tolist() == [0, 65504, SMALLEST, 0, 2.0**-18]


def test_tensors_of_other_rank_are_float16_and_matrices_a_byte():
    state = {"m": torch.randn(3, 5), "v": torch.randn(5), "s": torch.tensor(0.1), "c": torch.randn(2, 2, 2)}
    tensors = compact(state)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "m": torch.int8, "m.scale": torch.float16, "v": torch.float16, "s": torch.float16, "c": torch.float16,
    }  # fmt: skip
    assert tensors["m.scale"].shape == (3,)
    assert torch.equal(expand(tensors)["v"], state["v"].half().float())


def test_a_float16_or_float32_file_is_read_as_it_is():
    tensors = {"m": torch.randn(3, 5).half(), "v": torch.randn(5)}
    state = expand(tensors)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], tensors[name].float()) for name in tensors)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"m": torch.tensor([[1, 2]])}, "m is of torch.int64, not floating-point"),
        ({"m": torch.tensor([[1.0, torch.nan]])}, "m holds entries that are not finite"),
        ({"v": torch.tensor([-torch.inf])}, "v holds entries that are not finite"),
        ({"m": torch.tensor([[0.0, 1.01 * LARGEST_SCALED]])}, "m holds entries up to 8.4e.06, too large"),
        ({"v": torch.tensor([7e4])}, "v holds entries up to 7e.04, too large"),
        ({"v.scale": torch.ones(2)}, "v.scale: names that end in .scale"),
    ],
)
def test_a_state_that_has_no_compact_form_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        compact(state)


def good() -> dict[str, torch.Tensor]:
    return {"m": torch.tensor([[1, -127], [0, 127]], dtype=torch.int8), "m.scale": torch.ones(2).half()}


MALFORMED = {
    "a weight without its scale": ({"m.scale": None}, "m is int8 and lacks its scale m.scale"),
    "a scale without its weight": ({"m": None}, "m.scale is the scale of no int8 weight"),
    "a scale beside a float weight": ({"m": torch.ones(2, 2)}, "m.scale is the scale of no int8 weight"),
    "a scale too few": ({"m.scale": torch.ones(1).half()}, r"of shape \[1\], not float16 of shape \[2\]"),
    "scales as a column": ({"m.scale": torch.ones(2, 1).half()}, r"of shape \[2, 1\], not float16"),
    "scales in float32": ({"m.scale": torch.ones(2)}, "m.scale is torch.float32 of"),
    "an infinite scale": ({"m.scale": torch.tensor([1, torch.inf]).half()}, "negative or not finite"),
    "a scale that is no number": ({"m.scale": torch.tensor([torch.nan, 1]).half()}, "negative or not finite"),
    "a negative scale": ({"m.scale": torch.tensor([1.0, -1]).half()}, "negative or not finite"),
    "an integer below -127": ({"m": torch.full((2, 2), -128, dtype=torch.int8)}, "m holds -128"),
    "an int8 vector": ({"m": torch.ones(2, dtype=torch.int8)}, "int8 of rank 1"),
    "bfloat16": ({"v": torch.ones(2).bfloat16()}, "v is of torch.bfloat16"),
    "float64": ({"v": torch.ones(2).double()}, "v is of torch.float64"),
    "other integers": ({"v": torch.ones(2, 2, dtype=torch.uint8)}, "v is of torch.uint8"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_tensors_are_refused(change, message):
    assert expand(good())["m"].tolist() == [[1, -127], [0, 127]]
    tensors = {name: tensor for name, tensor in {**good(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        expand(tensors)


LARGE = Vocabulary(tuple(f"t{index}" for index in range(20)), 0, (0,))
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A tiny model's files, `model.safetensors` in plain float16."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.to_json_string())
    (tmp_path / "small_to_large.json").write_text(json.dumps([*range(8), -1]))
    state = {name: value.half() for name, value in LlamaForCausalLM(config).named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_the_loader_reads_both_forms_and_they_differ_by_the_rounding_alone(folder):
    plain = dict(load_builtin_weights(folder, LARGE)[0].named_parameters())
    rewrite(folder, compact)
    rounded = dict(load_builtin_weights(folder, LARGE)[0].named_parameters())
    expected = expand(compact(plain))
    assert rounded.keys() == plain.keys()
    assert all(torch.equal(rounded[name], expected[name]) for name in expected)
    assert not torch.equal(rounded[EMBEDDING], plain[EMBEDDING])


def without(name):
    return lambda tensors: {key: value for key, value in compact(tensors).items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{EMBEDDING}.scale"), "lacks its scale"),
        (without(EMBEDDING), "is the scale of no int8 weight"),
        (without("model.norm.weight"), "missing .*'model.norm.weight'"),
        (lambda tensors: {**compact(tensors), "more": torch.ones(2)}, r"unexpected \['more'\]"),
        (
            lambda tensors: compact({**tensors, EMBEDDING: tensors[EMBEDDING][:-1]}),
            r"embed_tokens.* is \[\d+, \d+\], not",
        ),
    ],
)
def test_the_loader_refuses_a_damaged_compact_file(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ModelError, match=f"the built-in proxy is damaged: .*{message}"):
        load_builtin_weights(folder, LARGE)


def test_weights_are_expanded_one_at_a_time():
    """Else the loader would hold the whole model twice: what comes first is whole before the last is looked at."""
    tensors = compact({"first": torch.ones(2, 3), "last": torch.ones(2, 3)})
    whole = expand(tensors)
    del tensors["last.scale"]
    weights = expanded(tensors)
    name, value = next(weights)
    assert name == "first"
    assert torch.equal(value, whole["first"])
    with pytest.raises(ValueError, match="last is int8 and lacks its scale"):
        list(weights)
