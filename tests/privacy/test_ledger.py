"""The ledger counts every release before it leaves, never twice, never less than happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat

import numpy as np
import pytest

from fedpt_secure.errors import BudgetExceeded, PrivacyError
from fedpt_secure.privacy import GaussianSteps, Ledger, epsilon_spent

STEP = GaussianSteps(2.0, 1.0, 1)
UPDATE = np.arange(5, dtype=np.float32)


def ledger(directory, epsilon=4.0):
    return Ledger(directory, epsilon=epsilon, delta=1e-5)


def test_a_release_is_counted_and_survives_reopening(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    assert ledger(tmp_path).history() == (STEP,)


def test_an_interrupted_round_gets_the_same_update_back(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    pending = ledger(tmp_path).pending("run", 0)
    assert pending.tobytes() == UPDATE.tobytes()
    assert ledger(tmp_path).pending("run", 1) is None


def test_a_second_release_for_one_round_is_refused(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    with pytest.raises(PrivacyError, match="already has a release"):
        book.release("run", 0, STEP, UPDATE + 1)
    assert book.history() == (STEP,)
    assert book.pending("run", 0).tobytes() == UPDATE.tobytes()


def test_a_settled_round_keeps_its_count_and_gives_no_update(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    book.release("run", 1, STEP, UPDATE)
    book.settle("run", rounds_done=1)
    with pytest.raises(PrivacyError, match="already taken part"):
        book.pending("run", 0)
    assert book.pending("run", 1) is not None
    assert book.history() == (GaussianSteps(2.0, 1.0, 2),)


def test_a_settled_update_is_gone_from_the_disk(tmp_path):
    book = ledger(tmp_path)
    secret = np.frombuffer(os.urandom(400), dtype=np.float32).copy()
    book.release("run", 0, STEP, secret)
    assert secret.tobytes() in (tmp_path / "ledger.sqlite").read_bytes()
    book.settle("run", rounds_done=1)
    assert secret.tobytes()[:64] not in (tmp_path / "ledger.sqlite").read_bytes()


def test_work_past_the_budget_is_declined_and_not_counted(tmp_path):
    once = epsilon_spent((STEP,), delta=1e-5)
    book = ledger(tmp_path, epsilon=once * 1.01)
    book.release("run", 0, STEP, UPDATE)
    with pytest.raises(BudgetExceeded, match="budget is"):
        book.check(STEP)
    with pytest.raises(BudgetExceeded):
        book.release("run", 1, STEP, UPDATE)
    assert book.history() == (STEP,)


def test_the_budget_survives_runs(tmp_path):
    once = epsilon_spent((STEP,), delta=1e-5)
    ledger(tmp_path, epsilon=once * 1.01).release("one run", 0, STEP, UPDATE)
    with pytest.raises(BudgetExceeded):
        ledger(tmp_path, epsilon=once * 1.01).release("another run", 0, STEP, UPDATE)


def test_without_privacy_there_is_no_budget_to_pass(tmp_path):
    book = ledger(tmp_path, epsilon=float("inf"))
    book.release("run", 0, GaussianSteps(0.0, 1.0, 1), UPDATE)
    assert book.history() == (GaussianSteps(0.0, 1.0, 1),)


def test_only_the_owner_may_read_it(tmp_path):
    ledger(tmp_path / "own").release("run", 0, STEP, UPDATE)
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "own" / "ledger.sqlite").stat().st_mode) == 0o600


def test_a_damaged_ledger_stops_the_client(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(PrivacyError, match="cannot be used"):
        ledger(tmp_path)


def _spend_and_die(directory):
    ledger(directory).release("run", 0, STEP, UPDATE)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_after_the_release_has_counted_it(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_spend_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert ledger(tmp_path).history() == (STEP,)
    assert ledger(tmp_path).pending("run", 0) is not None


def _spend(directory, epsilon, name, results):
    try:
        ledger(directory, epsilon).release(name, 0, STEP, UPDATE)
        results.put("spent")
    except BudgetExceeded:
        results.put("declined")


def test_two_processes_cannot_both_spend_the_last_of_a_budget(tmp_path):
    once = epsilon_spent((STEP,), delta=1e-5)
    ledger(tmp_path, once * 1.01)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_spend, args=(tmp_path, once * 1.01, f"run {index}", results)) for index in range(2)
    ]
    for process in processes:
        process.start()
    outcomes = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert outcomes == ["declined", "spent"]
