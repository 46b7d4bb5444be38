"""The directly tuned large model: it learns, is trained once, goes on after a crash, and is marked as not private."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.data import Cache
from fedpt_secure.data.examples import Example
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import DataError, ModelError
from fedpt_secure.evaluation import ceiling as module
from fedpt_secure.evaluation.ceiling import ceiling_digest, ceiling_document, tune_ceiling
from fedpt_secure.evaluation.direct_lora import (
    DirectSettings,
    DirectTuning,
    _FrozenHeadLoss,
    learning_rate,
    padded,
    planned_batches,
)
from fedpt_secure.evaluation.held_out import black_box_losses
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.large_weights import LargeWeights
from fedpt_secure.proxy import LocalTransformersLM

CPU = torch.device("cpu")
SETTINGS = DirectSettings(rank=2, learning_rate=0.05, batch_records=4, epochs=3, dtype="float32")


def llama(directory: Path, **changes) -> Path:
    """A random model with clear preferences: its logits have a standard deviation of about 3."""
    settings = {
        "vocab_size": 49152,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(directory)
    shutil.copy(builtin_directory() / "tokenizer.json", directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return LargeWeights(llama(tmp_path_factory.mktemp("large")), "a tiny model", "00" * 32)


@pytest.fixture(scope="module")
def examples():
    """Sixteen records over twelve tokens, two of them with a prompt that carries no loss."""
    rng = np.random.default_rng(0)
    records = [Example((0, *rng.integers(3, 15, rng.integers(4, 12)).tolist()), 1) for _ in range(16)]
    return [replace(example, loss_from=3) if index < 2 else example for index, example in enumerate(records)]


def adapter_tensors(ceiling):
    return load_file(ceiling.adapter / "adapter_model.safetensors")


def test_the_ceiling_learns_the_training_records(weights, examples, tmp_path):
    ceiling = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)
    before = black_box_losses(examples, LocalTransformersLM(weights.path, CPU))
    after = black_box_losses(examples, LocalTransformersLM(weights.path, CPU, adapter=ceiling.adapter))
    assert after.sum() < 0.8 * before.sum()
    assert (ceiling.records, ceiling.steps, ceiling.epochs) == (16, 12, 3)
    assert ceiling.tokens == 3 * sum(len(example.ids) - example.loss_from for example in examples)


def test_the_merged_model_is_the_one_that_was_trained(weights, examples, tmp_path):
    """The loss of a step at learning rate 0 is that of the adapter loaded anew and merged."""
    ceiling = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)
    tuning = DirectTuning(weights.path, SETTINGS, CPU)
    values = {name.replace(".default", ""): p for name, p in tuning.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in adapter_tensors(ceiling).items():
            values[name].copy_(value)
    merged = black_box_losses(examples, LocalTransformersLM(weights.path, CPU, adapter=ceiling.adapter))
    tokens = sum(len(example.ids) - example.loss_from for example in examples)
    assert tuning.step(examples, 0.0) == pytest.approx(merged.sum() / tokens, rel=1e-5)


def test_a_model_behind_an_api_has_no_ceiling(weights, examples, tmp_path):
    behind = replace(weights, endpoint=Endpoint.parse("llama.cpp:http://127.0.0.1:1"))
    with pytest.raises(ModelError, match="no weights to tune"):
        tune_ceiling(behind, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)


def test_it_is_trained_once(weights, examples, tmp_path, monkeypatch):
    first = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)

    def refuse(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "DirectTuning", refuse)
    assert tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU) == first


def test_other_records_weights_or_settings_are_another_ceiling(weights, examples):
    digests = {
        ceiling_digest(weights, examples, SETTINGS),
        ceiling_digest(weights, examples[1:], SETTINGS),
        ceiling_digest(weights, [replace(examples[0], loss_from=2), *examples[1:]], SETTINGS),
        ceiling_digest(replace(weights, digest="11" * 32), examples, SETTINGS),
        ceiling_digest(weights, examples, DirectSettings(**(SETTINGS.model_dump() | {"epochs": 4}))),
    }
    assert len(digests) == 5


def test_an_interrupted_training_goes_on_to_the_same_adapter(weights, examples, tmp_path, monkeypatch):
    whole = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path / "whole"), device=CPU)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    steps, step = [], DirectTuning.step

    def interrupted(self, *arguments):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(DirectTuning, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path / "cut"), device=CPU)
    counted = []
    monkeypatch.setattr(DirectTuning, "step", lambda self, *a: counted.append(1) or step(self, *a))
    resumed = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path / "cut"), device=CPU)
    assert len(counted) == 12 - 5
    assert all(torch.equal(value, adapter_tensors(whole)[name]) for name, value in adapter_tensors(resumed).items())
    assert resumed.training_loss == whole.training_loss
    assert not (resumed.adapter.parent / "progress.safetensors").exists()


def test_it_says_that_it_is_not_private_and_only_its_owner_can_enter(weights, examples, tmp_path):
    ceiling = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)
    folder = ceiling.adapter.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert json.loads((folder / "ceiling.json").read_text())["private"] is False
    assert "NOT PRIVATE" in (ceiling.adapter / "README.md").read_text()
    assert ceiling_document(ceiling)["private"] is False
    assert str(tmp_path) not in json.dumps(ceiling_document(ceiling))


@pytest.mark.parametrize("damage", ["adapter", "json", "schema"])
def test_a_damaged_ceiling_is_refused_and_not_trained_over(damage, weights, examples, tmp_path):
    ceiling = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)
    if damage == "adapter":
        path = ceiling.adapter / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path = ceiling.adapter.parent / "ceiling.json"
        path.write_text("{" if damage == "json" else path.read_text().replace("ceiling/1", "ceiling/2"))
    with pytest.raises(ModelError, match="damaged"):
        tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)


def test_a_checkpoint_of_another_training_is_refused(weights, examples, tmp_path, monkeypatch):
    tuning = DirectTuning(weights.path, SETTINGS, CPU)
    tuning.step(examples[:4], 0.01)
    module._save(tmp_path, "aa", tuning, [1.0], 1.0)
    with pytest.raises(ModelError, match="another training"):
        module._restore(tmp_path, "bb", tuning)
    other = DirectTuning(weights.path, DirectSettings(**(SETTINGS.model_dump() | {"rank": 3})), CPU)
    with pytest.raises(ModelError, match="another shape"):
        module._restore(tmp_path, "aa", other)


def test_no_training_record_is_refused(weights, tmp_path):
    with pytest.raises(DataError, match="no training record"):
        tune_ceiling(weights, [], SETTINGS, cache=Cache(tmp_path), device=CPU)


def test_the_frozen_head_loss_is_cross_entropy_with_its_gradient(monkeypatch):
    monkeypatch.setattr("fedpt_secure.evaluation.direct_lora._HEAD_ROWS", 3)
    rng = torch.Generator().manual_seed(0)
    head = torch.randn(20, 6, generator=rng)
    hidden = torch.randn(8, 6, generator=rng, requires_grad=True)
    targets = torch.randint(20, (8,), generator=rng)
    loss = _FrozenHeadLoss.apply(hidden, head, targets)
    (gradient,) = torch.autograd.grad(2 * loss, hidden)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(2 * expected, hidden)[0])


def test_a_model_whose_logits_are_not_its_head_alone_is_tuned_on_its_own_logits(weights, examples):
    """Capped or scaled logits: the shortcut is checked against the model, not assumed."""
    plain = DirectTuning(weights.path, SETTINGS, CPU)
    loss = plain.step(examples, 0.0)
    assert plain._linear_head is True
    scaled = DirectTuning(weights.path, SETTINGS, CPU)
    forward = scaled.model.forward

    def halved(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.logits = output.logits / 2
        return output

    scaled.model.forward = halved
    assert scaled.step(examples, 0.0) != pytest.approx(loss, rel=1e-3)
    assert scaled._linear_head is False


def test_judged_positions_are_those_that_predict_the_response():
    ids, mask, judged = padded([Example((0, 5, 6, 7), 2), Example((0, 8, 9, 4, 3, 2), 1)])
    assert ids.tolist() == [[0, 5, 6, 0, 0], [0, 8, 9, 4, 3]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert judged.tolist() == [[False, True, True, False, False], [True] * 5]


def test_every_record_is_seen_once_an_epoch_and_the_plan_is_reproducible(examples):
    plan = planned_batches(examples, SETTINGS)
    assert plan == planned_batches(examples, SETTINGS)
    for epoch in range(3):
        seen = [index for batch in plan[4 * epoch : 4 * epoch + 4] for index in batch]
        assert sorted(seen) == list(range(16))
    few = planned_batches(examples, DirectSettings(records=6, batch_records=4, epochs=2))
    assert len(set().union(*few)) == 6


def test_the_learning_rate_rises_stays_and_falls_and_is_never_zero():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:60] == [1.0] * 50
    assert 0 < rates[-1] < 0.05
    assert learning_rate(0, 1, 1.0) > 0


def test_an_adapter_of_another_model_is_refused(weights, examples, tmp_path):
    ceiling = tune_ceiling(weights, examples, SETTINGS, cache=Cache(tmp_path), device=CPU)
    other = llama(tmp_path / "other", hidden_size=8, num_hidden_layers=3)
    with pytest.raises(ModelError, match="does not fit"):
        LocalTransformersLM(other, CPU, adapter=ceiling.adapter)
