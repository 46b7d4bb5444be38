"""Held-out private text is read for the report and decides nothing."""

from __future__ import annotations

from dataclasses import replace

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.data.records import Record
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.federation import run as run_module
from fedpt_secure.progress import SILENT
from fedpt_secure.proxy import SteeringRule


def test_other_held_out_text_gives_the_same_adapter_rounds_and_epsilon(tiny_settings, tmp_path, monkeypatch):
    """Whatever were chosen by held-out text (a round to stop at, alpha, a step size) would cost privacy nobody counts.

    Noise comes from the seed here, so that "the same" means every bit.
    """
    config = build(RunConfig, {**tiny_settings, "insecure_deterministic": True})
    load = run_module.load_federated_text

    def with_other_held_out(*arguments, **keywords):
        text = load(*arguments, **keywords)
        nonsense = tuple(
            replace(client, held_out=tuple(Record(record.text[::-1]) for record in client.held_out))
            for client in text.clients
        )
        return replace(text, clients=nonsense)

    results, adapters = [], []
    for name in ("real", "nonsense"):
        directory = RunDirectory.create(tmp_path / name, config)
        results.append(run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT))
        adapters.append(directory.load_checkpoint().tensors["adapter"])
        monkeypatch.setattr(run_module, "load_federated_text", with_other_held_out)
    assert (adapters[0] == adapters[1]).all()
    assert results[0].statement == results[1].statement
    assert [line["survivors"] for line in results[0].transcripts] == [
        line["survivors"] for line in results[1].transcripts
    ]
    assert results[0].config == results[1].config
    losses = [result.evaluation.proxy_tuned[SteeringRule.of(config.proxy, responses=False)].sum() for result in results]
    assert losses[0] != losses[1]  # the report did read it
