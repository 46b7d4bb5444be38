"""A whole run under CKKS: the result of masks, other bytes, and every artefact names what was trusted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.crypto import CkksClient
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise

pytest.importorskip("tenseal")


def run(settings, path, cache_path, aggregator, **changes):
    federation = {**settings["federation"], "aggregator": aggregator, **changes}
    config = build(RunConfig, {**settings, "insecure_deterministic": True, "federation": federation})
    directory = RunDirectory.create(path, config)
    return directory, run_training(config, directory, cache=Cache(cache_path), progress=SILENT)


def test_ckks_gives_the_held_out_result_of_masks_and_says_what_it_trusted(tiny_settings, tmp_path):
    """Same seed, same noise in the updates; the sums differ by the flooding noise alone."""
    results = {
        aggregator: run(tiny_settings, tmp_path / aggregator, tmp_path / "cache", aggregator, rounds=2)
        for aggregator in ("masks", "ckks")
    }
    summaries = {name: summarise(result) for name, (_, result) in results.items()}
    for arm, masks in summaries["masks"]["arms"].items():
        assert summaries["ckks"]["arms"][arm]["loss"] == pytest.approx(masks["loss"], abs=2e-3)
    adapters = {name: each.load_checkpoint().tensors["adapter"] for name, (each, _) in results.items()}
    assert np.abs(adapters["masks"] - adapters["ckks"]).max() < 0.02 * np.abs(adapters["masks"]).max()
    directory = results["ckks"][0]
    written = json.loads((directory.path / "privacy.json").read_text())
    assert written == json.loads(json.dumps(summaries["ckks"]["privacy"]))
    assert written["aggregation"]["aggregator"] == "ckks"
    assert "one colluding client breaks" in written["aggregation"]["trust"]
    for line in directory.read_log("transcript"):
        assert line["aggregator"] == "ckks"
        assert "one colluding client breaks" in line["trust"]
    assert summaries["masks"]["privacy"]["aggregation"]["aggregator"] == "masks"


def test_byte_counts_are_those_of_the_ciphertexts_and_no_message_holds_an_update(tiny_settings, tmp_path, monkeypatch):
    received, updates = [], []
    receive, mask = AggregationServer.receive, CkksClient.mask

    def recording_receive(self, phase, client_id, message):
        received.append(message)
        receive(self, phase, client_id, message)

    def recording_mask(self, inbox, vector):
        updates.append(np.ascontiguousarray(vector, dtype="<f8").tobytes())
        return mask(self, inbox, vector)

    monkeypatch.setattr(AggregationServer, "receive", recording_receive)
    monkeypatch.setattr(CkksClient, "mask", recording_mask)
    _, result = run(tiny_settings, tmp_path / "run", tmp_path / "cache", "ckks", rounds=1)
    (line,) = result.transcripts
    assert sum(line["bytes_up"].values()) == sum(map(len, received))
    assert min(line["bytes_up"].values()) > 60_000
    everything = b"".join(received)
    assert len(updates) == 5
    assert not any(update[at : at + 16] in everything for update in updates for at in range(0, len(update) - 15, 16))


def test_an_interrupted_round_is_resumed_with_a_fresh_key_and_opened_once(tiny_settings, tmp_path, monkeypatch):
    """The process dies between the first opened round and its checkpoint, as in tests/integration/test_resume.py."""
    from fedpt_secure.federation import outcome as module

    config = build(
        RunConfig,
        {**tiny_settings, "federation": {**tiny_settings["federation"], "aggregator": "ckks", "rounds": 2}},
    )
    directory = RunDirectory.create(tmp_path / "run", config)
    real, calls = module.save, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(module, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    monkeypatch.setattr(module, "save", real)
    result = run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    first, second = result.transcripts
    assert first["aborted"]
    assert all("already" in reason for reason in first["dropped"].values())
    assert not second["aborted"]
