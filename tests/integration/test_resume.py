"""`kill -9` at any moment: the run goes on, and its epsilon is that of an uninterrupted one.

So is its adapter, bit for bit, unless clients had begun to open the sum of the round: then the round counts as lost,
because a second sum over other survivors would give single updates away.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import LedgerError, RunDirectoryError
from fedpt_secure.federation import ClientWorker, RunDirectory, run_training
from fedpt_secure.federation import run as run_module
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT
from fedpt_secure.proxy import SteeringRule

# (class or module, function, number of calls before the process dies inside it, before or after the call)
MOMENTS = {
    "before the first round": (RunDirectory, "count_start", 1, "before"),
    "while keys are advertised": (ClientWorker, "announce", 8, "before"),
    "while shares are sent": (ClientWorker, "share_keys", 8, "after"),
    "before an update is counted": (Ledger, "release", 8, "before"),
    "after an update is counted, before it is sent": (Ledger, "release", 8, "after"),
    "after a masked update is sent": (ClientWorker, "train_and_mask", 9, "after"),
    "while survivors are confirmed": (ClientWorker, "confirm", 8, "before"),
    "while shares are revealed": (ClientWorker, "unmask", 8, "after"),
    "before the sum is computed": (AggregationServer, "aggregate", 2, "before"),
    "after the sum is computed": (AggregationServer, "aggregate", 2, "after"),
    "before the logs are written": (RunDirectory, "append", 3, "before"),
    "between log and checkpoint": (RunDirectory, "append", 4, "after"),
    "after the checkpoint, before clients forget": (RunDirectory, "save_checkpoint", 3, "after"),
    "while clients forget": (Ledger, "settle", 14, "before"),
    "before the evaluation": (run_module, "evaluate_arms", 1, "before"),
}

ROUND_LOST = {
    "while shares are revealed",
    "before the sum is computed",
    "after the sum is computed",
    "before the logs are written",
    "between log and checkpoint",
}


def _die_inside(owner, name, calls, when):
    original = getattr(owner, name)
    count = 0

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


def _killed_run(config, path, cache, moment):
    _die_inside(*MOMENTS[moment])
    run_training(config, RunDirectory.create(path, config), cache=Cache(cache), progress=SILENT)


@pytest.fixture(scope="module")
def uninterrupted():
    """Filled by the first test that needs it: the adapter and statement of a run nobody killed."""
    return {}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_epsilon_and_adapter(moment, tiny_settings, tmp_path, uninterrupted):
    """Noise comes from the seed here, so that "the same update is sent again" can be seen in every bit.

    The epsilon of such a run is not promised to anybody; what is compared is what the ledgers counted.
    """
    config = build(RunConfig, {**tiny_settings, "insecure_deterministic": True})
    cache = tmp_path / "cache"
    if not uninterrupted:
        directory = RunDirectory.create(tmp_path / "whole", config)
        uninterrupted["result"] = run_training(config, directory, cache=Cache(cache), progress=SILENT)
        uninterrupted["adapter"] = directory.load_checkpoint().tensors["adapter"]
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(config, tmp_path / "run", cache, moment)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "the run was not killed where the test says"
    directory = RunDirectory.open(tmp_path / "run")
    result = run_training(config, directory, cache=Cache(cache), progress=SILENT)
    expected = uninterrupted["result"].statement
    assert (result.statement.steps, result.statement.noise_multiplier) == (expected.steps, expected.noise_multiplier)
    assert result.statement.to_json() == expected.to_json()
    assert [line["round"] for line in directory.read_log("transcript")] == [0, 1, 2]
    assert [line["round"] for line in directory.read_log("metrics")] == [0, 1, 2]
    assert [bool(line["aborted"]) for line in result.transcripts] == [False, moment in ROUND_LOST, False]
    same = (directory.load_checkpoint().tensors["adapter"] == uninterrupted["adapter"]).all()
    assert same == (moment not in ROUND_LOST)


def test_a_killed_private_run_sends_the_same_update_again_and_spends_once(tiny_config, tmp_path):
    cache = tmp_path / "cache"
    moment = "after an update is counted, before it is sent"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(tiny_config, tmp_path / "run", cache, moment)
    )
    process.start()
    process.join(120)
    clients = tmp_path / "run" / "clients"
    run_id = RunDirectory.open(tmp_path / "run").load_checkpoint().run_id.hex()

    def pending(round_index):
        ledgers = {path.name: Ledger(path) for path in clients.iterdir()}
        return {name: ledger.pending(run_id, round_index) for name, ledger in ledgers.items()}

    before = {name: update.tobytes() for name, update in pending(1).items() if update is not None}
    assert len(before) == 3
    sent = {}
    original = ClientWorker._release

    def recording(self, announcement, small):
        update = original(self, announcement, small)
        sent[announcement.round_index, update.tobytes()] = self.client_id
        return update

    ClientWorker._release = recording
    try:
        result = run_training(tiny_config, RunDirectory.open(tmp_path / "run"), cache=Cache(cache), progress=SILENT)
    finally:
        ClientWorker._release = original
    assert all((1, update) in sent for update in before.values())
    assert result.statement.private
    assert result.statement.epsilon <= 4.0
    assert result.statement.steps == 3


@pytest.mark.parametrize("moment", ["after a masked update is sent", "before the evaluation"])
@pytest.mark.parametrize("loss", ["all ledgers", "one ledger", "emptied"])
def test_a_lost_ledger_is_an_error_and_never_a_smaller_epsilon(moment, loss, tiny_config, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(tiny_config, tmp_path / "run", tmp_path / "cache", moment)
    )
    process.start()
    process.join(120)
    ledgers = sorted((tmp_path / "run" / "clients").rglob("ledger.sqlite"))
    for path in ledgers if loss == "all ledgers" else ledgers[:1]:
        path.write_bytes(b"") if loss == "emptied" else path.unlink()
    with pytest.raises(LedgerError):
        run_training(tiny_config, RunDirectory.open(tmp_path / "run"), cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_noise_from_a_seed_cannot_become_private_by_editing_the_configuration(tiny_settings, tmp_path):
    config = build(RunConfig, {**tiny_settings, "insecure_deterministic": True})
    directory = RunDirectory.create(tmp_path / "run", config)
    run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("insecure_deterministic = true", "insecure_deterministic = false"))
    edited = RunDirectory.open(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="insecure_deterministic: True != False"):
        run_training(edited.config(), edited, cache=Cache(tmp_path / "cache"), progress=SILENT)


def test_other_text_is_refused(tiny_settings, tmp_path):
    config = build(RunConfig, tiny_settings)
    directory = RunDirectory.create(tmp_path / "run", config)
    run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    path = Path(tiny_settings["data"]["source"])
    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace("pizza", "pasta"))
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace(str(path), str(changed)))
    edited = RunDirectory.open(tmp_path / "run").config()
    with pytest.raises(RunDirectoryError, match=r"data\.source"):
        run_training(edited, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    (tmp_path / "run" / "config.toml").write_text(text)
    original = path.read_text()
    try:
        path.write_text(changed.read_text())
        with pytest.raises(RunDirectoryError, match="another text"):
            run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    finally:
        path.write_text(original)


def test_a_finished_run_resumes_to_the_same_result_without_training(tiny_config, tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", tiny_config)
    first = run_training(tiny_config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    monkeypatch.setattr(ClientWorker, "announce", lambda *args: pytest.fail("trained again"))
    second = run_training(tiny_config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert first.statement == second.statement
    rule = SteeringRule.of(tiny_config.proxy, responses=False)
    assert (first.evaluation.proxy_tuned[rule] == second.evaluation.proxy_tuned[rule]).all()
