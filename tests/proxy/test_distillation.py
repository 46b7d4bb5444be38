"""Distillation moves the adapter, and only it, towards the proxied large LM; public text is the only text it takes."""

from __future__ import annotations

import inspect
import math
import typing

import numpy as np
import pytest
import torch

from fedpt_secure.errors import BlackBoxError, ConfigError, DataError, ModelError
from fedpt_secure.proxy import distillation, public_answers
from fedpt_secure.proxy.arithmetic import restricted_logprobs
from fedpt_secure.proxy.distillation import distil
from fedpt_secure.proxy.public_answers import AnswerCache, PublicAnswers, PublicText, TopClasses, ask_black_box
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

RULE = SteeringRule(alpha=0.5, shares=((0, 0.7), (2, 0.2)))
SETTINGS = {"rule": RULE, "steps": 12, "learning_rate": 0.02, "seed": 4, "batch_sequences": 4}


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    sequences = tuple((0, *rng.integers(3, 49_152, rng.integers(4, 14)).tolist()) for _ in range(12))
    return PublicText("twelve random sequences, public domain", sequences)


@pytest.fixture
def answers(large, pair, text, tmp_path):
    return ask_black_box(large, pair.token_map, text, everything(pair, tmp_path))


def everything(pair, directory):
    """A cache that keeps every class: nothing is approximated."""
    return AnswerCache(directory, model="a tiny model", token_map=pair.token_map, top_k=600)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_small_lm_comes_closer_to_the_proxied_large_one_on_text_it_did_not_learn_from(pair, answers):
    report = distil(pair._model, answers, **SETTINGS)
    assert report.divergence_after < 0.9 * report.divergence_before
    assert report.steps == 12
    assert report.held_out_tokens == len(answers.small_ids[distillation._split(12, 1, 1, rng_of(4))[0][0]])
    assert report.source == answers.source


def rng_of(seed):
    return np.random.default_rng([seed, 0x64697374])


def test_the_measured_divergence_is_that_of_the_definition(large, pair, text, answers):
    """KL(proxied large restricted to the small classes || tuned small LM), in float64 over the whole vocabulary."""
    model, token_map = pair._model, pair.token_map
    (index,), _ = distillation._split(12, 1, 1, rng_of(4))
    ids = text.sequences[index]
    base, tuned = next(pair.score([token_map.to_small(ids)]))
    (dense,) = large.score([ids])
    places = torch.arange(len(dense))
    proxied = steered_logprobs(dense.double(), base.double(), tuned.double(), token_map, RULE, places)
    teacher = restricted_logprobs(proxied, token_map)
    expected = (teacher.exp() * (teacher - tuned.double())).sum(-1).mean().item()
    report = distil(model, answers, **SETTINGS)
    assert report.divergence_before == pytest.approx(expected, rel=5e-3)


def test_only_trainable_parameters_change_and_the_same_ones_stay_trainable(pair, answers):
    before, flags = weights(pair._model), {n: p.requires_grad for n, p in pair._model.named_parameters()}
    distil(pair._model, answers, **SETTINGS)
    changed = {name for name, value in weights(pair._model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name, trainable in flags.items() if trainable}
    assert flags == {n: p.requires_grad for n, p in pair._model.named_parameters()}
    assert all(parameter.grad is None for parameter in pair._model.parameters())


def test_the_seed_fixes_the_result(pair, answers):
    start = weights(pair._model)

    def run(seed):
        pair._model.load_state_dict(start, strict=False)
        distil(pair._model, answers, **(SETTINGS | {"seed": seed}))
        return weights(pair._model)

    first, again, other = run(4), run(4), run(5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_teacher_is_the_aggregate_as_it_came_not_as_it_is_changed(pair, answers, monkeypatch):
    teachers = []
    original = distillation._Teacher

    def recording(*arguments):
        teachers.append(original(*arguments))
        return teachers[-1]

    monkeypatch.setattr(distillation, "_Teacher", recording)
    fresh = original(pair._model, answers, RULE, range(12)).logprobs
    distil(pair._model, answers, **SETTINGS)
    assert len(teachers) == 1
    for index, logprobs in teachers[0].logprobs.items():
        torch.testing.assert_close(logprobs.float(), fresh[index].float(), atol=0.02, rtol=2e-3)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_a_way_to_learn_and_not_part_of_the_measure(pair, answers, temperature):
    report = distil(pair._model, answers, **SETTINGS, temperature=temperature)
    plain = report.divergence_before
    assert report.divergence_after < plain


def test_a_failure_leaves_the_adapter_as_it_was(pair, answers, monkeypatch):
    before = weights(pair._model)
    with pytest.raises(ModelError, match="diverged"):
        distil(pair._model, answers, **(SETTINGS | {"learning_rate": 1e30}))
    assert all(torch.equal(value, before[name]) for name, value in weights(pair._model).items())

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(pair._model, answers, **SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in weights(pair._model).items())
    assert all(parameter.grad is None for parameter in pair._model.parameters())


def test_tokens_the_black_box_excludes_do_not_poison_the_loss(pair, answers):
    top = []
    for index, answer in enumerate(answers.top):
        cut = answer.fill(torch.zeros(len(answers.small_ids[index]), 600))
        cut[:, :300] = -math.inf
        top.append(TopClasses.of(cut.log_softmax(-1), 600))
    cut_answers = PublicAnswers(answers.source, answers.token_map, answers.small_ids, tuple(top))
    report = distil(pair._model, cut_answers, **SETTINGS)
    assert report.divergence_after < report.divergence_before


def test_the_most_likely_classes_are_enough_to_learn_from(large, pair, text, tmp_path):
    cache = AnswerCache(tmp_path, model="a tiny model", token_map=pair.token_map, top_k=50)
    cut = ask_black_box(large, pair.token_map, text, cache)
    report = distil(pair._model, cut, **SETTINGS)
    assert report.divergence_after < 0.95 * report.divergence_before


def test_nothing_private_can_be_passed():
    """The signatures know token ids with a named public source, weights and numbers; no record, example or client."""
    for function in (ask_black_box, distil, AnswerCache.save):
        hints = typing.get_type_hints(function)
        assert not {name for name in map(str, hints.values()) if "fedpt_secure.data" in name}
    assert "text" not in inspect.signature(distil).parameters
    assert "fedpt_secure.data" not in inspect.getsource(distillation) + inspect.getsource(public_answers)


@pytest.mark.parametrize(("source", "sequences"), [("", ((0,), (0,))), ("books", ((0,),)), ("books", ((0,), ()))])
def test_public_text_needs_a_source_and_something_to_measure_on(source, sequences):
    with pytest.raises(DataError, match="public text needs"):
        PublicText(source, sequences)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"temperature": 0.0},
        {"batch_sequences": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(pair, answers, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        distil(pair._model, answers, **(SETTINGS | change))


def test_a_model_without_anything_to_train_is_refused(pair, answers):
    pair._model.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        distil(pair._model, answers, **SETTINGS)


def test_public_text_longer_than_the_black_boxs_context_is_refused(large, pair, tmp_path):
    with pytest.raises(BlackBoxError, match="65 tokens"):
        ask_black_box(large, pair.token_map, PublicText("long", ((0,) * 65, (0,))), everything(pair, tmp_path))
