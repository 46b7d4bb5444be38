"""The ledger counts every release before it leaves, never twice, never less than happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat

import numpy as np
import pytest

from fedpt_secure.errors import AlreadyReleased, BudgetExceeded, LedgerError
from fedpt_secure.privacy import GaussianSteps, Ledger, epsilon_spent

STEP = GaussianSteps(2.0, 1.0, 1)
UPDATE = np.arange(5) / 3


class Book(Ledger):
    """A ledger whose releases carry secret noise unless a test says otherwise."""

    def release(self, *arguments, noise_is_private=True):
        super().release(*arguments, noise_is_private=noise_is_private)


def ledger(directory, epsilon=4.0):
    return Book.create(directory, epsilon=epsilon, delta=1e-5)


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
    with pytest.raises(AlreadyReleased, match="already has a release"):
        book.release("run", 0, STEP, UPDATE + 1)
    assert book.history() == (STEP,)
    assert book.pending("run", 0).tobytes() == UPDATE.tobytes()


def test_a_settled_round_keeps_its_count_and_gives_no_update(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    book.release("run", 1, STEP, UPDATE)
    book.settle("run", rounds_done=1)
    with pytest.raises(AlreadyReleased, match="already taken part"):
        book.pending("run", 0)
    assert book.pending("run", 1) is not None
    assert book.history() == (GaussianSteps(2.0, 1.0, 2),)


def test_a_settled_update_is_gone_from_the_disk(tmp_path):
    book = ledger(tmp_path)
    secret = np.frombuffer(os.urandom(800), dtype=np.float64).copy()
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


def test_a_missing_ledger_is_an_error_and_never_replaced_by_an_empty_one(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path, epsilon=4.0, delta=1e-5)
    assert not (tmp_path / "ledger.sqlite").exists()


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_an_emptied_or_damaged_ledger_is_an_error(tmp_path, content):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger(tmp_path, epsilon=4.0, delta=1e-5)
    with pytest.raises(LedgerError):
        ledger(tmp_path)


def test_each_release_remembers_whether_its_noise_was_secret(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    book.release("run", 1, STEP, UPDATE, noise_is_private=False)
    book.release("other", 0, STEP, UPDATE)
    assert [(row.round_index, row.noise_is_private) for row in book.releases("run")] == [(0, True), (1, False)]


def test_a_round_is_opened_once_and_then_no_other_attempt_is_joined(tmp_path):
    book = ledger(tmp_path)
    book.begin_session("run", 0, 0)
    book.begin_session("run", 0, 1)
    with pytest.raises(AlreadyReleased, match="joined before"):
        book.begin_session("run", 0, 1)
    book.open_round("run", 0)
    with pytest.raises(AlreadyReleased, match="give single updates away"):
        ledger(tmp_path).begin_session("run", 0, 2)
    with pytest.raises(AlreadyReleased, match="give single updates away"):
        ledger(tmp_path).open_round("run", 0)
    book.begin_session("run", 1, 2)


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
