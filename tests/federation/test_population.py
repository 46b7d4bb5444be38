"""Simulated clients are in memory while a round asks them, and that changes no bit of what they compute."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import DataError, LedgerError
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.federation import population as population_module
from fedpt_secure.federation import run as run_module
from fedpt_secure.federation.population import Population
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.progress import SILENT


def settings(tiny_models, chat_file, *, mode="local", rounds=3, cohort=5):
    return build(
        RunConfig,
        {
            "seed": 3,
            "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
            "models": {**tiny_models, "device": "cpu", "context_length": 12},
            "lora": {"rank": 2},
            "privacy": {"mode": mode},
            "federation": {"rounds": rounds, "cohort": cohort},
            "evaluation": {"records": 10, "bootstrap_samples": 200},
            "insecure_deterministic": True,
        },
    )


def trained(config, path):
    directory = RunDirectory.create(path, config)
    run_training(config, directory, cache=Cache(path.parent / "cache"), progress=SILENT)
    return directory.load_checkpoint().tensors["adapter"]


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_clients_built_anew_each_round_train_what_clients_built_once_do(
    tiny_models, chat_file, tmp_path, monkeypatch, mode
):
    config = settings(tiny_models, chat_file, mode=mode)
    anew = trained(config, tmp_path / "anew")
    kept, build_cohort = {}, Population.cohort

    def once(population, client_ids):
        if not kept:
            kept.update(build_cohort(population, population.roster))
        return {client_id: kept[client_id] for client_id in client_ids}

    monkeypatch.setattr(Population, "cohort", once)
    monkeypatch.setattr(SmallLM, "forget", lambda small, ids, loss_from: None)
    at_once = trained(config, tmp_path / "once")
    assert len(kept) == 6
    assert np.abs(anew).max() > 0
    assert np.array_equal(anew, at_once)


def test_memory_of_a_rounds_clients_goes_with_the_round(tiny_models, chat_file, tmp_path, monkeypatch):
    """Their workers before the next one begins, their kept activations after their last: six clients, five a round."""
    alive, kept, build_cohort, run_round = [], [], Population.cohort, run_module.run_round

    def watched_cohort(population, client_ids):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        workers = build_cohort(population, client_ids)
        alive[:] = [weakref.ref(worker) for worker in workers.values()]
        return workers

    def watched_round(server, workers, small, **rest):
        result = run_round(server, workers, small, **rest)
        kept.append(small.split.cached_examples)
        return result

    monkeypatch.setattr(Population, "cohort", watched_cohort)
    monkeypatch.setattr(run_module, "run_round", watched_round)
    trained(settings(tiny_models, chat_file), tmp_path / "run")
    assert len(alive) == 5
    assert kept[0] > 0
    assert kept[-1] == 0


@pytest.mark.parametrize(("bound", "kept"), [(1 << 14, 6), (25, 2), (0, 0)])
def test_records_are_cut_once_within_the_bound_and_anew_beyond_it(
    tiny_models, chat_file, tmp_path, monkeypatch, bound, kept
):
    monkeypatch.setattr(population_module, "KEPT_RECORDS", bound)
    cut, cuts = run_module.client_examples, Counter()

    def counted(client, models, config):
        cuts[client.client_id] += 1
        assert len(client.train) in range(8, 13)
        return cut(client, models, config)

    monkeypatch.setattr(run_module, "client_examples", counted)
    trained(settings(tiny_models, chat_file, cohort=6), tmp_path / "run")
    assert len(cuts) == 6
    # Once before the first round, where all are tried; then in the first round alone, or in each of three.
    assert sorted(cuts.values()) == [2] * kept + [4] * (6 - kept)


def test_a_record_that_cannot_be_cut_is_found_before_a_ledger_is_begun(tiny_models, chat_file, tmp_path, monkeypatch):
    cut = run_module.client_examples

    def failing(client, models, config):
        if client.client_id.endswith("5"):
            raise DataError("a record encodes to no tokens")
        return cut(client, models, config)

    monkeypatch.setattr(run_module, "client_examples", failing)
    with pytest.raises(DataError, match="no tokens"):
        trained(settings(tiny_models, chat_file), tmp_path / "run")
    assert not (tmp_path / "run" / "clients").exists()


def test_a_ledger_that_is_lost_between_rounds_stops_the_run(tiny_models, chat_file, tmp_path, monkeypatch):
    """Built anew, a client must not find an empty ledger where there was one."""
    build_cohort = Population.cohort
    rounds = iter(range(3))

    def robbed(population, client_ids):
        if next(rounds) == 1:
            next(iter((tmp_path / "run" / "clients").rglob("ledger.sqlite"))).unlink()
        return build_cohort(population, population.roster)

    monkeypatch.setattr(Population, "cohort", robbed)
    with pytest.raises(LedgerError):
        trained(settings(tiny_models, chat_file, cohort=6), tmp_path / "run")
