"""Base and tuned from one model: each is what PEFT computes, and the model is left as it was found."""

from __future__ import annotations

import pytest
import torch

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.adapter_pair import AdapterPair, adapter_off

SEQUENCES = [[5, 9, 0, 1], [3], [7, 7, 2, 598, 599, 1]]


def one_by_one(pair, sequence):
    model, size = pair._model, pair.token_map.small_vocabulary_size
    with torch.no_grad():
        tuned = model(torch.tensor([sequence])).logits[0, :, :size].log_softmax(-1)
        base = model.unload().eval()(torch.tensor([sequence])).logits[0, :, :size].log_softmax(-1)
    return base, tuned


def state(model):
    layers = [module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters")]
    return model.training, layers, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_scores_are_the_bare_base_model_and_the_model_with_its_adapter(pair, sequence):
    scored = list(pair.score(SEQUENCES))[SEQUENCES.index(sequence)]
    for got, expected in zip(scored, one_by_one(pair, sequence), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_adapter_makes_a_difference_and_an_empty_one_makes_none(pair):
    base, tuned = next(pair.score([SEQUENCES[0]]))
    assert (base - tuned).abs().max() > 0.5
    for name, parameter in pair._model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    base, tuned = next(pair.score([SEQUENCES[0]]))
    torch.testing.assert_close(base, tuned, rtol=0, atol=1e-6)


def test_a_session_equals_scoring_the_whole_text_on_both_sides(pair):
    rows = [[5, 9, 0, 1], [3]]
    session = pair.start(rows)
    for step in range(3):
        for got, side in zip(session.logprobs(), (0, 1), strict=True):
            for row, ids in enumerate(rows):
                torch.testing.assert_close(got[row], next(pair.score([ids]))[side][-1], rtol=0, atol=1e-4)
        session.append([11 + step, 598])
        rows = [[*rows[0], 11 + step], [*rows[1], 598]]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(pair, training):
    pair._model.train(training)
    before = state(pair._model)
    list(pair.score(SEQUENCES))
    session = pair.start([[1]])
    session.append([2])
    session.logprobs()
    assert state(pair._model) == before
    assert [name for name, p in pair._model.named_parameters() if p.requires_grad and "lora_B" not in name] == []


def test_pefts_own_switch_would_thaw_the_frozen_matrices(pair):
    """Why `adapter_off` exists: were PEFT to mend this, the plain `disable_adapter()` could be used."""
    with pair._model.disable_adapter():
        pass
    assert any(p.requires_grad for name, p in pair._model.named_parameters() if "lora_A" in name)


def test_the_model_is_left_as_it_was_found_when_the_forward_fails(pair):
    before = state(pair._model)
    with pytest.raises(RuntimeError, match="stop"), adapter_off(pair._model):
        raise RuntimeError("stop")
    assert state(pair._model) == before


def test_dropout_is_off_whatever_mode_the_model_is_in(pair):
    pair._model.train()
    for module in pair._model.modules():
        if (
            isinstance(module, torch.nn.ModuleDict)
            and "default" in module
            and isinstance(module["default"], torch.nn.Identity)
        ):
            module["default"] = torch.nn.Dropout(0.9)
    first, second = next(pair.score([SEQUENCES[0]])), next(pair.score([SEQUENCES[0]]))
    assert torch.equal(first[1], second[1])


def test_texts_that_do_not_fit_are_refused(pair):
    for ask in (lambda s: list(pair.score(s)), pair.start):
        with pytest.raises(ModelError, match="empty text"):
            ask([[]])
        with pytest.raises(ModelError, match="65 tokens"):
            ask([[0] * 65])
    session = pair.start([[0] * 63])
    session.append([1])
    with pytest.raises(ModelError, match="context"):
        session.append([1])


def test_a_map_wider_than_the_output_layer_is_refused(pair):
    with pytest.raises(ModelError, match="608 output columns"):
        AdapterPair(pair._model, TokenMap.identity(609))
