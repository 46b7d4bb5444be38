"""Whole runs in the modes whose noise is born in pieces: the promise is kept, also when clients vanish and runs die."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import LedgerError, PrivacyError, RoundError
from fedpt_secure.federation import ClientWorker, RunDirectory, run_training
from fedpt_secure.federation import run as run_module
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.privacy import GaussianSteps, Ledger, SecureRandom, epsilon_spent, noise
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise

MODES = ("distributed", "client")
TARGET = 4.0


def quick(*chosen, of):
    """All of them with `-m slow`, the chosen ones always: whole runs take seconds each."""
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.slow) for case in of]


EITHER = [(mode,) for mode in MODES]


def changed(settings, **groups):
    return build(RunConfig, {**settings, **{key: {**settings.get(key, {}), **value} for key, value in groups.items()}})


def ring_config(settings, mode, **groups):
    """Cohorts of six; five survive at least, two may collude: three honest shares."""
    privacy = {"mode": mode, "corrupt_fraction": 0.3, "epsilon": TARGET, **groups.pop("privacy", {})}
    federation = {"cohort": 6, "rounds": 2, **groups.pop("federation", {})}
    return changed(settings, privacy=privacy, federation=federation, **groups)


def run(config, path, cache_path):
    directory = RunDirectory.create(path, config)
    return directory, run_training(config, directory, cache=Cache(cache_path), progress=SILENT)


def ledgers(directory):
    return [Ledger(path) for path in sorted((directory.path / "clients").iterdir())]


@pytest.mark.parametrize(
    ("mode", "clipping"),
    quick(
        ("distributed", "fixed"),
        ("client", "quantile"),
        of=[(mode, clipping) for mode in MODES for clipping in ("fixed", "quantile")],
    ),
)
def test_a_run_keeps_its_promise_against_every_adversary(mode, clipping, tiny_settings, tmp_path):
    config = ring_config(tiny_settings, mode, privacy={"clipping": clipping})
    directory, result = run(config, tmp_path / "run", tmp_path / "cache")
    stated = json.loads((directory.path / "privacy.json").read_text())
    assert stated["private"] is True
    assert TARGET * 0.95 < stated["epsilon"] <= TARGET
    assert stated["unit"].startswith("client" if mode == "client" else "single record")
    against = [(item["adversary"], item["colluding_clients"]) for item in stated["guarantees"]]
    assert against == [
        ("outsider", 0),
        ("server", 0),
        ("server_with_clients", 1),
        ("server_with_clients", 2),
        ("malicious_server_with_clients", 2),
    ]
    epsilons = [item["epsilon"] for item in stated["guarantees"]]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] < epsilons[-1] == max(epsilons) == stated["epsilon"]
    assert json.loads(json.dumps(summarise(result)["privacy"])) == stated
    for ledger in ledgers(directory):
        assert (ledger.budget.unit, ledger.budget.epsilon) == ("client" if mode == "client" else "record", TARGET)
        assert sum(item.steps for item in ledger.history()) == 2
        assert ledger.spent() <= TARGET
    adapter = directory.load_checkpoint().tensors["adapter"]
    assert np.isfinite(adapter).all()
    assert adapter.any()
    # After the first round: the second may bring it back, at the largest step up and down.
    clip_norm = directory.read_log("metrics")[0]["clip_norm"]
    assert (clip_norm == config.privacy.clip_norm) is (clipping == "fixed")


@pytest.mark.parametrize("mode", quick(of=EITHER))
def test_a_sampled_run_needs_less_noise_and_keeps_its_promise(mode, tiny_settings, tmp_path):
    whole = ring_config(tiny_settings, mode)
    half = ring_config(tiny_settings, mode, privacy={"sampling_rate": 0.5})
    _, first = run(whole, tmp_path / "whole", tmp_path / "cache")
    _, second = run(half, tmp_path / "half", tmp_path / "cache")
    assert second.statement.noise_multiplier < first.statement.noise_multiplier
    assert second.statement.epsilon <= TARGET
    assert any("sampled" in item for item in second.statement.assumptions)


@pytest.mark.parametrize("mode", quick(("distributed",), of=EITHER))
def test_without_noise_the_run_says_that_it_is_not_private(mode, tiny_settings, tmp_path):
    _, result = run(ring_config(tiny_settings, mode, privacy={"epsilon": math.inf}), tmp_path / "run", tmp_path / "c")
    assert result.statement.private is False
    assert result.statement.epsilon is None
    assert all(item.epsilon is None for item in result.statement.guarantees)


@pytest.mark.parametrize("mode", quick(("client",), of=EITHER))
def test_noise_from_a_seed_promises_nothing(mode, tiny_settings, tmp_path):
    config = ring_config({**tiny_settings, "insecure_deterministic": True}, mode)
    directory, result = run(config, tmp_path / "run", tmp_path / "cache")
    assert result.statement.epsilon is None
    assert all(item.epsilon is None for item in result.statement.guarantees)
    assert not any(item.noise_is_private for item in _releases(directory))


def _releases(directory):
    run_id = directory.load_checkpoint().run_id.hex()
    return [item for ledger in ledgers(directory) for item in ledger.releases(run_id)]


@pytest.mark.parametrize("mode", quick(("distributed",), of=EITHER))
def test_colluders_that_leave_nobody_honest_are_refused_before_training(mode, tiny_settings, tmp_path):
    config = ring_config(tiny_settings, mode, privacy={"corrupt_fraction": 0.49}, federation={"minimum_survivors": 2})
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(PrivacyError, match="nobody whose noise counts"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not (directory.path / "clients").exists()


@pytest.mark.parametrize(("mode", "delta"), [("distributed", 1 / 50), ("client", 1 / 6)])
def test_a_delta_that_is_no_promise_is_refused_before_training(mode, delta, tiny_settings, tmp_path):
    config = ring_config(tiny_settings, mode, privacy={"delta": delta})
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(PrivacyError, match="not below 1/"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not (directory.path / "clients").exists()


# Clients that vanish.


def vanishing(monkeypatch, plan):
    """Round -> (how many of the cohort vanish, before which phase)."""

    def draw(cohort, *, dropout, seed, round_index):
        count, phase = plan.get(round_index, (0, "mask"))
        return dict.fromkeys(cohort[:count], phase)

    monkeypatch.setattr(run_module, "draw_dropouts", draw)


@pytest.mark.parametrize("mode", quick(("distributed",), of=EITHER))
def test_with_dropouts_at_the_bound_every_epsilon_is_that_of_who_was_left(mode, tiny_settings, tmp_path, monkeypatch):
    """Five of six survive, then six; the calibrated epsilon, of three honest shares, does not move."""
    vanishing(monkeypatch, {0: (1, "mask")})
    _, result = run(ring_config(tiny_settings, mode), tmp_path / "run", tmp_path / "cache")
    assert [len(line["survivors"]) for line in result.transcripts] == [5, 6]
    assert not any(line["aborted"] for line in result.transcripts)
    stated = result.statement

    def cost(*shares):
        history = (GaussianSteps(stated.noise_multiplier * math.sqrt(count / 3), 1.0, 1) for count in shares)
        return pytest.approx(epsilon_spent(tuple(history), delta=1e-5), abs=2e-3)

    assert [item.epsilon for item in stated.guarantees] == [cost(5, 6), cost(5, 6), cost(4, 5), cost(3, 4), cost(3, 3)]
    assert stated.epsilon == stated.guarantees[-1].epsilon <= TARGET


@pytest.mark.parametrize("mode", quick(("client",), of=EITHER))
def test_a_round_with_fewer_survivors_than_the_minimum_aborts_and_is_counted(
    mode, tiny_settings, tmp_path, monkeypatch
):
    vanishing(monkeypatch, {0: (2, "mask")})
    directory, result = run(ring_config(tiny_settings, mode), tmp_path / "run", tmp_path / "cache")
    assert [bool(line["aborted"]) for line in result.transcripts] == [True, False]
    assert result.transcripts[0]["survivors"] == []
    counted = Counter(item.round_index for item in _releases(directory))
    assert counted == {0: 4, 1: 6}
    assert result.statement.steps == 2
    assert TARGET * 0.95 < result.statement.epsilon <= TARGET


@pytest.mark.parametrize("mode", quick(of=EITHER))
def test_a_run_with_random_dropouts_keeps_its_promise(mode, tiny_settings, tmp_path):
    config = ring_config(tiny_settings, mode, federation={"rounds": 5, "dropout": 0.1})
    directory, result = run(config, tmp_path / "run", tmp_path / "cache")
    assert sum(len(line["dropped"]) for line in result.transcripts) > 0
    assert 0 < result.statement.epsilon <= TARGET
    assert len(_releases(directory)) >= sum(len(line["survivors"]) for line in result.transcripts)


@pytest.mark.parametrize("mode", quick(of=EITHER))
def test_if_all_rounds_abort_the_ledgers_still_count_them(mode, tiny_settings, tmp_path, monkeypatch):
    vanishing(monkeypatch, {0: (2, "mask"), 1: (3, "mask")})
    config = ring_config(tiny_settings, mode)
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(RoundError, match="all 2 rounds were aborted"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert Counter(item.round_index for item in _releases(directory)) == {0: 4, 1: 3}
    assert not directory.load_checkpoint().tensors["adapter"].any()


# Runs that die.

MOMENTS = {
    "before a share is counted": (Ledger, "release", 8, "before"),
    "after a share is counted, before it leaves": (Ledger, "release", 8, "after"),
    "after masked vectors have left": (ClientWorker, "train_and_mask", 9, "after"),
    "while the sum is opened": (ClientWorker, "unmask", 8, "after"),
    "after the sum is computed": (AggregationServer, "aggregate", 2, "after"),
}
LEFT = {
    "before a share is counted": 1,
    "after a share is counted, before it leaves": 2,
    "after masked vectors have left": 3,
    "while the sum is opened": 6,
    "after the sum is computed": 6,
}
"""How many clients of round 1 have counted their share when the run dies."""


def _log_what_happens(path):
    """Append to a file, across processes: every noise key that is made, every masked vector that leaves."""
    make, send = noise._KeystreamRandom.__init__, ClientWorker.train_and_mask

    def making(self, key):
        with path.open("a") as log:
            log.write(f"key {key.hex()}\n")
        make(self, key)

    def sending(self, inbox, small):
        round_index = self._announced.round_index
        answer = send(self, inbox, small)
        with path.open("a") as log:
            log.write(f"sent {round_index} {self.client_id}\n")
        return answer

    noise._KeystreamRandom.__init__, ClientWorker.train_and_mask = making, sending

    def undo():
        noise._KeystreamRandom.__init__, ClientWorker.train_and_mask = make, send

    return undo


def _killed_run(config, path, cache, moment, log):
    _log_what_happens(log)
    owner, name, calls, when = MOMENTS[moment]
    original, count = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
    run_training(config, RunDirectory.create(path, config), cache=Cache(cache), progress=SILENT)


@pytest.mark.parametrize(
    ("mode", "moment"),
    quick(
        ("distributed", "after masked vectors have left"),
        ("client", "while the sum is opened"),
        of=[(mode, moment) for moment in MOMENTS for mode in MODES],
    ),
)
def test_a_killed_run_sends_no_share_twice_uses_no_noise_twice_and_keeps_its_promise(
    mode, moment, tiny_settings, tmp_path
):
    config, log = ring_config(tiny_settings, mode, federation={"rounds": 3}), tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(config, tmp_path / "run", tmp_path / "cache", moment, log)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "the run was not killed where the test says"
    directory = RunDirectory.open(tmp_path / "run")
    assert Counter(item.round_index for item in _releases(directory)) == {0: 6, 1: LEFT[moment]}
    undo = _log_what_happens(log)
    try:
        result = run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    finally:
        undo()
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    keys = [content for kind, content in lines if kind == "key"]
    sent = [content for kind, content in lines if kind == "sent"]
    assert len(keys) == len(set(keys))
    assert len(keys) >= len(sent)
    assert len(sent) == len(set(sent))
    # Whoever had counted its share declines; with one client less than the minimum or more, the round is lost.
    lost = result.transcripts[1]
    assert bool(lost["aborted"]) is (LEFT[moment] > 1)
    declined = [reason for reason in lost["dropped"].values() if "already" in reason]
    assert len(declined) == LEFT[moment]
    assert [bool(line["aborted"]) for line in result.transcripts] == [False, LEFT[moment] > 1, False]
    assert result.statement.private
    assert TARGET * 0.95 < result.statement.epsilon <= TARGET
    assert result.statement.steps == 3
    assert all(ledger.spent() <= TARGET for ledger in ledgers(directory))


def test_resending_a_share_would_be_noticed(tiny_settings, tmp_path, monkeypatch):
    """The broken variant: a ledger that forgets what has left lets every client of the killed round send again.

    As long as its budget lasts, that is: with two rounds planned in place of three, the budget would decline.
    """
    config = ring_config(tiny_settings, "distributed", federation={"rounds": 3})
    log, moment = tmp_path / "log", "after masked vectors have left"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(config, tmp_path / "run", tmp_path / "cache", moment, log)
    )
    process.start()
    process.join(120)
    monkeypatch.setattr(Ledger, "pending", lambda *args: None)
    monkeypatch.setattr(Ledger, "release", lambda *args, **kwargs: None)
    undo = _log_what_happens(log)
    try:
        # The statement still notices: it misses the updates of the rounds that the broken ledger did not count.
        with pytest.raises(LedgerError, match="does not know its update in round"):
            run_training(config, RunDirectory.open(tmp_path / "run"), cache=Cache(tmp_path / "cache"), progress=SILENT)
    finally:
        undo()
    sent = [line for line in log.read_text().splitlines() if line.startswith("sent")]
    assert len(sent) > len(set(sent))


def _draw(queue):
    queue.put(SecureRandom().random_bytes(64))


def test_workers_in_parallel_never_share_noise():
    """Forks of one process, where a generator that was made before would repeat itself."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_draw, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    drawn = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(set(drawn)) == 4
