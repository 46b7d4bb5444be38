"""Base and tuned from one model: each is what PEFT computes, and the model is left as it was found."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

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


def cases():
    """Which layers and modules carry LoRA."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "last-down": ([2], ["down_proj"], [1, 1, 2]),
        "middle-all": ([1], every, [1, 2, 2]),
        "everywhere": (None, every, [2, 2, 2]),
    }


@pytest.fixture
def adapted(llama):
    base = llama(2, vocab_size=60, num_hidden_layers=3)
    return lambda layers, modules, **changes: adapt(base, layers, modules, changes)


def adapt(base, layers, modules, changes):
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=modules, layers_to_transform=layers, task_type="CAUSAL_LM", **changes
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, config).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("name", cases())
def test_one_pass_for_both_sides_is_two_passes(adapted, name):
    layers, modules, copies = cases()[name]
    model = adapted(layers, modules)
    once, twice = (AdapterPair(model, TokenMap.identity(60), one_pass=one_pass) for one_pass in (True, False))
    assert once._folded.copies == copies
    texts = [[5, 9, 0, 1], [3], [7, 7, 2, 58, 59, 1]]
    for mine, theirs in zip(once.score(texts), twice.score(texts), strict=True):
        for side, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(side, expected, rtol=0, atol=1e-4)
    sessions = once.start(texts), twice.start(texts)

    def same():
        for side, expected in zip(*(session.logprobs() for session in sessions), strict=True):
            torch.testing.assert_close(side, expected, rtol=0, atol=1e-4)

    same()
    assert (sessions[0].logprobs()[0] - sessions[0].logprobs()[1]).abs().max() > 0.5
    for act in (
        lambda session: session.append([1, 2, 3]),
        lambda session: session.join([[4, 4]]),
        lambda session: session.select([3, 0, 2]),
        lambda session: (session.rewind([1, 0, 2]), session.append([9, 9, 9])),
    ):
        list(map(act, sessions))
        same()
    for mine, theirs in zip(*(session.score_draft([[1, 2], [], [3]]) for session in sessions), strict=True):
        for side, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(side, expected, rtol=0, atol=1e-4)
    for session in sessions:
        session.keep([1, 0, 1])
    same()


def test_layers_below_the_first_adapted_one_run_once_per_row(adapted):
    pair = AdapterPair(adapted([2], ["down_proj"]), TokenMap.identity(60))
    rows = []
    base = pair._model.get_base_model()
    hooks = [
        module.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
        for module in (*(layer.mlp for layer in base.model.layers), base.lm_head)
    ]
    pair.start([[1, 2], [3]])
    assert rows == [2, 2, 4, 4]
    for hook in hooks:
        hook.remove()


def test_the_one_pass_reads_the_adapter_as_it_is_now(adapted):
    model = adapted([2], ["down_proj"])
    pair = AdapterPair(model, TokenMap.identity(60))
    next(pair.score([[1, 2]]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    base, tuned = next(pair.score([[1, 2]]))
    torch.testing.assert_close(base, tuned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"use_dora": True}], ids=str)
def test_an_adapter_that_is_more_than_plain_lora_takes_two_passes(adapted, changes):
    pair = AdapterPair(adapted([2], ["down_proj"], **changes), TokenMap.identity(60))
    assert pair._folded is None
    base, tuned = next(pair.score([[1, 2]]))
    assert (base - tuned).abs().max() > 0.1


def test_the_model_is_left_as_it_was_found_when_the_one_pass_fails(pair):
    before = state(pair._model)
    with pytest.raises(IndexError):
        list(pair.score([[10_000]]))
    assert state(pair._model) == before
    assert not any("forward" in vars(module) for module in pair._model.modules())
    assert not any(module._forward_pre_hooks for module in pair._model.modules())
