"""A whole run, in miniature: what it computes, what it leaves behind, what its parties see."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedpt_secure.config import RunConfig, build
from fedpt_secure.crypto import FixedPointEncoding
from fedpt_secure.data import Cache
from fedpt_secure.errors import ConfigError, ModelError, PrivacyError, RoundError
from fedpt_secure.federation import RunDirectory, open_finished, run_training
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise


def changed(settings, **groups):
    return build(RunConfig, {**settings, **{key: {**settings.get(key, {}), **value} for key, value in groups.items()}})


def run(config, path, cache_path):
    directory = RunDirectory.create(path, config)
    return directory, run_training(config, directory, cache=Cache(cache_path), progress=SILENT)


def test_a_run_keeps_its_promise_and_leaves_everything_behind(tiny_config, tmp_path):
    directory, result = run(tiny_config, tmp_path / "run", tmp_path / "cache")
    summary = summarise(result)
    assert summary["private"] is True
    assert 0 < summary["privacy"]["epsilon"] <= 4.0
    assert set(summary["arms"]) == {"large_base", "small_base", "small_tuned", "proxy_tuned"}
    assert all(math.isfinite(arm["loss"]) and len(arm["ci"]) == 2 for arm in summary["arms"].values())
    low, high = summary["improvement"]["ci"]
    assert low <= summary["improvement"]["loss"] <= high
    assert summary["bytes"]["up_per_client_round"] > 4 * summary["training"]["trained_parameters"]
    assert json.loads((directory.path / "privacy.json").read_text()) == json.loads(json.dumps(summary["privacy"]))
    names = {path.name for path in directory.path.iterdir()}
    assert {"config.toml", "adapter", "metrics.jsonl", "transcript.jsonl", "privacy.json", "checkpoint"} <= names
    assert len(directory.read_log("metrics")) == len(directory.read_log("transcript")) == 3
    json.dumps(summary, allow_nan=False)


def released(directory) -> np.ndarray:
    content = load_file(directory.adapter / "adapter_model.safetensors")
    return np.concatenate([content[name].reshape(-1) for name in sorted(content) if "lora_B" in name])


def test_the_released_adapter_is_the_average_of_the_iterates_and_training_goes_on_from_the_last(
    tiny_settings, tmp_path
):
    runs = {}
    for decay in (0.0, 0.5):
        config = changed({**tiny_settings, "insecure_deterministic": True}, training={"average_decay": decay})
        runs[decay], _ = run(config, tmp_path / str(decay), tmp_path / "cache")
    last, averaged = (runs[decay].load_checkpoint().tensors for decay in (0.0, 0.5))
    assert np.array_equal(averaged["adapter"], last["adapter"])
    assert np.array_equal(released(runs[0.0]), last["adapter"])
    expected = (averaged["average"] / (1 - 0.5**3)).astype(np.float32)
    assert np.array_equal(released(runs[0.5]), expected)
    assert not np.array_equal(expected, last["adapter"])
    # A finished run that is resumed releases the same average again, not an average of the average.
    again = RunDirectory.open(runs[0.5].path)
    run_training(again.config(), again, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert np.array_equal(released(again), expected)
    # Whoever opens the run again (reports, generate, serve) works with what it released, not with the last iterate.
    opened = open_finished(again, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert np.array_equal(opened.models.small.adapter_vector(), expected)


def test_a_run_that_trains_the_heads_bias_releases_it_in_logits_and_is_opened_with_it(tiny_settings, tmp_path):
    config = changed({**tiny_settings, "insecure_deterministic": True}, lora={"output_bias": 0.25})
    directory, result = run(config, tmp_path / "run", tmp_path / "cache")
    small = open_finished(directory, cache=Cache(tmp_path / "cache"), progress=SILENT).models.small
    vector, classes = small.adapter_vector(), small.token_map.small_vocabulary_size
    assert np.array_equal(vector, directory.load_checkpoint().tensors["adapter"])
    assert summarise(result)["training"]["trained_parameters"] == len(vector)
    content = load_file(directory.adapter / "adapter_model.safetensors")
    units = content["base_model.model.lm_head.lora_B.bias"] / vector[:classes]
    assert np.array_equal(np.exp2(np.rint(np.log2(units))), units)
    assert len(set(units.tolist())) > 1
    assert vector[:classes].all()


def test_the_servers_rate_is_what_the_pace_makes_of_it(tiny_settings, tmp_path):
    """One round is a tenth of a rise over ten: a tenth of the step."""
    adapters = []
    for warm_up in (0, 10):
        settings = {**tiny_settings, "insecure_deterministic": True}
        config = changed(settings, training={"server_warm_up": warm_up}, federation={"rounds": 1})
        directory, _ = run(config, tmp_path / str(warm_up), tmp_path / "cache")
        adapters.append(directory.load_checkpoint().tensors["adapter"])
    whole, tenth = adapters
    assert np.abs(whole).max() > 0
    assert np.allclose(tenth, whole / 10, rtol=1e-5)


def test_the_adapter_loads_with_plain_peft(tiny_config, tiny_models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, _ = run(tiny_config, tmp_path / "run", tmp_path / "cache")
    base = AutoModelForCausalLM.from_pretrained(tiny_models["small"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, directory.adapter)
    saved = {name: value for name, value in tuned.named_parameters() if "lora_B" in name}
    vector = torch.cat([saved[name].reshape(-1) for name in sorted(saved)]).detach().numpy()
    assert (vector == directory.load_checkpoint().tensors["adapter"]).all()
    assert np.abs(vector).sum() > 0


def test_without_noise_the_run_says_that_it_is_not_private(tiny_settings, tmp_path):
    config = changed(tiny_settings, privacy={"epsilon": float("inf")})
    _, result = run(config, tmp_path / "run", tmp_path / "cache")
    assert result.statement.private is False
    assert result.statement.epsilon is None
    assert result.statement.claim().startswith("NOT PRIVATE")


def test_noise_from_a_seed_repeats_itself_bit_for_bit_and_is_marked_as_not_private(tiny_settings, tmp_path):
    config = changed({**tiny_settings, "insecure_deterministic": True})
    first, result = run(config, tmp_path / "one", tmp_path / "cache")
    second, _ = run(config, tmp_path / "two", tmp_path / "cache")
    adapters = [directory.load_checkpoint().tensors["adapter"] for directory in (first, second)]
    assert (adapters[0] == adapters[1]).all()
    assert json.loads((first.path / "privacy.json").read_text())["private"] is False
    assert result.statement.epsilon is None


def test_the_same_seed_gives_the_same_split_and_cohorts_but_never_the_same_noise(tiny_config, tmp_path):
    one, first = run(tiny_config, tmp_path / "one", tmp_path / "cache")
    two, second = run(tiny_config, tmp_path / "two", tmp_path / "cache")
    assert first.text.digest == second.text.digest
    assert [line["cohort"] for line in first.transcripts] == [line["cohort"] for line in second.transcripts]
    adapters = [directory.load_checkpoint().tensors["adapter"] for directory in (one, two)]
    assert (adapters[0] != adapters[1]).any()


def test_a_run_with_dropouts_goes_on_and_counts_who_spent(tiny_settings, tmp_path):
    config = changed(tiny_settings, federation={"rounds": 4, "dropout": 0.15})
    directory, result = run(config, tmp_path / "run", tmp_path / "cache")
    assert sum(len(line["dropped"]) for line in result.transcripts) > 0
    assert not all(line["aborted"] for line in result.transcripts)
    assert result.statement.epsilon <= 4.0
    released = sum(
        sum(item.steps for item in Ledger(path).history()) for path in (directory.path / "clients").iterdir()
    )
    survivors = sum(len(line["survivors"]) for line in result.transcripts)
    assert released >= survivors


def test_a_run_whose_rounds_all_abort_says_so_and_changes_nothing(tiny_settings, tmp_path):
    config = changed(tiny_settings, federation={"rounds": 2, "dropout": 0.95})
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(RoundError, match="all 2 rounds were aborted"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not directory.load_checkpoint().tensors["adapter"].any()


def test_what_cannot_be_promised_is_refused_before_training(tiny_settings, tmp_path):
    config = changed(tiny_settings, privacy={"delta": 0.5})
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(PrivacyError, match="not below 1/"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not (directory.path / "clients").exists()


def test_records_longer_than_a_model_can_hold_are_refused_before_training(tiny_settings, tmp_path):
    config = changed(tiny_settings, models={"context_length": 65})
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="has 64 positions"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not (directory.path / "clients").exists()


def test_a_small_lm_whose_gradients_depend_on_the_batch_is_refused(tiny_settings, tiny_models, tmp_path):
    """Dynamic rotary embeddings change with the longest text beside a record; no sensitivity bound would hold."""
    dynamic = tmp_path / "dynamic"
    shutil.copytree(tiny_models["small"], dynamic)
    content = json.loads((dynamic / "config.json").read_text())
    content["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (dynamic / "config.json").write_text(json.dumps(content))
    config = changed(tiny_settings, models={"small": str(dynamic)})
    with pytest.raises(ModelError, match="dynamic rotary embedding"):
        run(config, tmp_path / "run", tmp_path / "cache")


def test_a_cohort_larger_than_the_population_is_refused(tiny_settings, tmp_path):
    config = changed(tiny_settings, federation={"cohort": 7})
    with pytest.raises(ConfigError, match="the data has 6"):
        run(config, tmp_path / "run", tmp_path / "cache")


def test_distillation_moves_the_adapter_and_costs_no_privacy(tiny_settings, tmp_path):
    settings = {**tiny_settings, "insecure_deterministic": True}
    plain, first = run(changed(settings), tmp_path / "plain", tmp_path / "cache")
    taught, second = run(changed(settings, proxy={"distill_steps": 2}), tmp_path / "taught", tmp_path / "cache")
    adapters = [directory.load_checkpoint().tensors["adapter"] for directory in (plain, taught)]
    assert (adapters[0] != adapters[1]).any()
    assert first.statement.steps == second.statement.steps


def _views(config, tmp_path, monkeypatch):
    """Run, and give back everything the server received, and every client's update as floats and in the ring."""
    received: list[bytes] = []
    updates: list[bytes] = []
    receive, encode = AggregationServer.receive, FixedPointEncoding.encode

    def recording_receive(self, phase, client_id, message):
        received.append(message)
        receive(self, phase, client_id, message)

    def recording_encode(self, values, **arguments):
        ring = encode(self, values, **arguments)
        updates.extend((np.ascontiguousarray(values, dtype="<f4").tobytes(), ring.tobytes()))
        return ring

    monkeypatch.setattr(AggregationServer, "receive", recording_receive)
    monkeypatch.setattr(FixedPointEncoding, "encode", recording_encode)
    run(config, tmp_path / "run", tmp_path / "cache")
    return received, updates


def _leaks(received, updates):
    """Whether any 16 aligned bytes of an update stand anywhere in what was received; by chance: below 1e-30."""
    everything = b"".join(received)
    return any(update[at : at + 16] in everything for update in updates for at in range(0, len(update) - 15, 16))


def test_no_message_to_the_server_holds_an_update(tiny_config, tmp_path, monkeypatch):
    received, updates = _views(tiny_config, tmp_path, monkeypatch)
    assert len(received) == 3 * 5 * 5  # rounds, clients, phases
    assert len(updates) == 3 * 5 * 2
    assert not _leaks(received, updates)


def test_with_the_masks_off_the_updates_would_be_seen(tiny_config, tmp_path, monkeypatch):
    """The broken variant: the same check notices clients that do not mask."""
    monkeypatch.setattr("fedpt_secure.crypto.client.apply_masks", lambda *args, **kwargs: None)
    assert _leaks(*_views(tiny_config, tmp_path, monkeypatch))


def test_the_servers_side_has_no_name_for_one_clients_update():
    """On the types: what the server's methods give back is bytes for clients, or the aggregate."""
    import inspect

    public = {
        name: inspect.signature(method).return_annotation
        for name, method in inspect.getmembers(AggregationServer, inspect.isfunction)
        if not name.startswith("_")
    }
    assert public == {
        "aggregate": "RoundAggregate",
        "publish_confirmations": "bytes",
        "publish_keys": "bytes",
        "publish_survivors": "bytes",
        "receive": "None",
        "route_shares": "Mapping[str, bytes]",
    }
