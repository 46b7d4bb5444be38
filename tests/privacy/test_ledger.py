"""The ledger counts every release before it leaves, never twice or less; its budget is the owner's."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
import stat
import time

import numpy as np
import pytest

from fedpt_secure.errors import AlreadyReleased, BudgetExceeded, LedgerError, PrivacyError, UnitNotCovered
from fedpt_secure.privacy import Budget, GaussianSteps, Ledger, epsilon_spent, ledger_file
from fedpt_secure.privacy.budget import charge
from fedpt_secure.privacy.ledger_file import LedgerFile

STEP = GaussianSteps(2.0, 1.0, 1)
UPDATE = np.arange(5) / 3
ONCE = epsilon_spent((STEP,), delta=1e-5)


class Book(Ledger):
    """A ledger whose releases are those of mode `local` with secret noise unless a test says otherwise."""

    def release(self, *arguments, mode="local", noise_is_private=True):
        super().release(*arguments, mode=mode, noise_is_private=noise_is_private)


def ledger(directory, epsilon=4.0, unit="record"):
    return Book.create(directory, budget=Budget(epsilon, 1e-5, unit))


def test_a_release_is_counted_and_survives_reopening(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    assert Ledger(tmp_path).history() == (STEP,)
    assert Ledger(tmp_path).spent() == ONCE


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
    for path in tmp_path.iterdir():
        assert secret.tobytes()[:64] not in path.read_bytes()


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_an_update_with_a_share_of_the_noise_is_never_sent_twice(tmp_path, mode):
    """Two sums over different survivors would carry the same share, and their difference less noise than promised."""
    book = ledger(tmp_path, epsilon=50.0)
    book.release("run", 0, STEP, None, mode=mode)
    with pytest.raises(AlreadyReleased, match="already taken part"):
        book.pending("run", 0)
    with pytest.raises(AlreadyReleased, match="already has a release"):
        book.release("run", 0, STEP, None, mode=mode)
    assert len(book.releases("run")) == 1


@pytest.mark.parametrize(("mode", "update"), [("distributed", UPDATE), ("client", UPDATE), ("local", None)])
def test_only_mode_local_keeps_its_update(tmp_path, mode, update):
    book = ledger(tmp_path)
    with pytest.raises(PrivacyError, match="to keep"):
        book.release("run", 0, STEP, update, mode=mode)
    assert book.history() == ()


def test_work_past_the_budget_is_declined_and_not_counted(tmp_path):
    book = ledger(tmp_path, epsilon=ONCE * 1.01)
    book.release("run", 0, STEP, UPDATE)
    with pytest.raises(BudgetExceeded, match="budget is"):
        book.check(STEP, mode="local", noise_is_private=True)
    with pytest.raises(BudgetExceeded):
        book.release("run", 1, STEP, UPDATE)
    assert book.history() == (STEP,)


def test_the_budget_survives_runs_and_no_later_run_changes_it(tmp_path):
    ledger(tmp_path, epsilon=ONCE * 1.01).release("one run", 0, STEP, UPDATE)
    other_server = ledger(tmp_path, epsilon=1000.0)
    assert other_server.budget.epsilon == ONCE * 1.01
    with pytest.raises(BudgetExceeded):
        other_server.release("another run", 0, STEP, UPDATE)
    assert other_server.runs() == ("one run",)


def test_the_budgets_own_delta_decides_whatever_a_run_promised(tmp_path):
    strict = Book.create(tmp_path, budget=Budget(ONCE * 1.01, 1e-9))
    with pytest.raises(BudgetExceeded, match="delta 1e-09"):
        strict.release("run", 0, STEP, UPDATE)


def test_without_privacy_there_is_no_budget_to_pass(tmp_path):
    book = ledger(tmp_path, epsilon=math.inf)
    book.release("run", 0, GaussianSteps(0.0, 1.0, 1), UPDATE)
    assert book.history() == (GaussianSteps(0.0, 1.0, 1),)
    assert book.budget.epsilon == math.inf


def test_a_record_is_charged_for_a_client_level_release_at_half_the_noise(tmp_path):
    """A record more or less changes a clipped update into another one: 2 C apart, where a client's coming moves C.

    The worst pair of updates, v and -v, is one Gaussian mechanism of sensitivity 2 C. The broken charge, at the whole
    noise, would state less than that.
    """
    book = ledger(tmp_path, epsilon=100.0)
    book.release("run", 0, STEP, None, mode="client")
    assert book.history() == (GaussianSteps(1.0, 1.0, 1),)
    assert book.spent() == epsilon_spent((GaussianSteps(1.0, 1.0, 1),), delta=1e-5) > 2 * ONCE
    assert ledger(tmp_path / "other", unit="client").spent() == 0.0


def test_a_budget_for_the_whole_client_declines_record_level_work(tmp_path):
    book = ledger(tmp_path, unit="client")
    with pytest.raises(UnitNotCovered, match="single records") as caught:
        book.release("run", 0, STEP, UPDATE)
    assert caught.value.decline_code == "unit"
    with pytest.raises(UnitNotCovered):
        book.check(STEP, mode="distributed", noise_is_private=True)
    book.release("run", 0, STEP, None, mode="client")
    assert book.history() == (STEP,)


def test_sampling_clients_amplifies_a_clients_promise_and_not_its_records():
    sampled = GaussianSteps(2.0, 0.1, 1)
    assert charge(sampled, "client", "client") == sampled
    assert charge(sampled, "client", "record") == GaussianSteps(1.0, 1.0, 1)


def test_each_release_remembers_its_mode_and_whether_its_noise_was_secret(tmp_path):
    book = ledger(tmp_path, epsilon=math.inf)
    book.release("run", 0, STEP, UPDATE)
    book.release("run", 1, STEP, UPDATE, noise_is_private=False)
    book.release("run", 2, STEP, None, mode="distributed")
    book.release("other", 0, STEP, UPDATE)
    assert [(row.round_index, row.mode, row.noise_is_private) for row in book.releases("run")] == [
        (0, "local", True),
        (1, "local", False),
        (2, "distributed", True),
    ]
    assert book.runs() == ("run", "other")


def test_every_budget_stays_visible_and_the_last_one_counts(tmp_path):
    book = ledger(tmp_path, epsilon=4.0)
    book.set_budget(Budget(2.0, 1e-5, set_by="ward 3"))
    book.set_budget(Budget(3.0, 1e-5), confirm_raise=True)
    assert [(budget.epsilon, budget.set_by) for budget in book.budgets()] == [(4.0, ""), (2.0, "ward 3"), (3.0, "")]
    assert all(budget.set_at.endswith("+00:00") for budget in book.budgets())
    assert book.budget.epsilon == 3.0


def test_noise_from_a_seed_is_charged_as_no_noise(tmp_path):
    strict = ledger(tmp_path / "strict", epsilon=1000.0)
    with pytest.raises(BudgetExceeded):
        strict.check(STEP, mode="local", noise_is_private=False)
    with pytest.raises(BudgetExceeded):
        strict.release("run", 0, STEP, UPDATE, noise_is_private=False)
    assert strict.spent() == 0.0
    free = ledger(tmp_path / "free", epsilon=math.inf)
    free.release("run", 0, STEP, UPDATE, noise_is_private=False)
    assert math.isinf(free.spent())


@pytest.mark.parametrize("more", [Budget(4.1, 1e-5), Budget(4.0, 1e-4), Budget(math.inf, 1e-6)])
def test_more_than_before_is_allowed_only_when_the_owner_confirms(tmp_path, more):
    book = ledger(tmp_path, epsilon=4.0)
    with pytest.raises(PrivacyError, match="allows more") as caught:
        book.set_budget(more)
    assert "--confirm-raise" in caught.value.hint
    assert len(book.budgets()) == 1
    book.set_budget(more, confirm_raise=True)
    assert book.budget.epsilon == more.epsilon


def test_from_the_client_to_single_records_is_more(tmp_path):
    with pytest.raises(PrivacyError, match="allows more"):
        ledger(tmp_path, unit="client").set_budget(Budget(4.0, 1e-5, "record"))


def test_a_budget_below_what_is_spent_stops_further_work(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    assert book.set_budget(Budget(0.1, 1e-5)) == ONCE
    with pytest.raises(BudgetExceeded):
        book.check(GaussianSteps(1000.0, 1.0, 1), mode="local", noise_is_private=True)


def test_a_budget_for_the_client_cannot_follow_record_level_releases(tmp_path):
    book = ledger(tmp_path)
    book.release("run", 0, STEP, UPDATE)
    with pytest.raises(UnitNotCovered):
        book.set_budget(Budget(1.0, 1e-5, "client"))
    assert book.budget.unit == "record"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"unit": "person"}, "unit"),
        ({"set_by": "two\nlines"}, "one printable line"),
        ({"set_by": "x" * 201}, "one printable line"),
        ({"set_by": "\udc80"}, "one printable line"),
    ],
)
def test_what_is_no_budget_is_refused(changes, rule):
    with pytest.raises(PrivacyError, match=rule):
        Budget(**{"epsilon": 1.0, "delta": 1e-5, **changes})


def test_only_the_owner_may_read_it(tmp_path):
    ledger(tmp_path / "own").release("run", 0, STEP, UPDATE)
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "own").iterdir()} == {0o600}


def test_a_missing_ledger_is_an_error_and_never_replaced_by_an_empty_one(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_ledger_that_is_there_is_never_begun_again(tmp_path, monkeypatch):
    """Also where another process creates it between the look and the creation."""
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    assert ledger(tmp_path, epsilon=9.0).history() == (STEP,)


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_an_emptied_or_damaged_ledger_is_an_error(tmp_path, content):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)
    with pytest.raises(LedgerError):
        ledger(tmp_path)


def test_a_ledger_cut_short_anywhere_is_an_error(tmp_path):
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    path = tmp_path / "ledger.sqlite"
    whole = path.read_bytes()
    for size in range(0, len(whole), 1024):
        path.write_bytes(whole[:size])
        with pytest.raises(LedgerError):
            Ledger(tmp_path)
        assert path.stat().st_size == size
    path.write_bytes(whole)
    assert Ledger(tmp_path).history() == (STEP,)


@pytest.mark.parametrize(
    "edit",
    [
        "DELETE FROM releases WHERE round_index = 1",
        "DELETE FROM releases WHERE round_index = 0",
        "DELETE FROM opened",
        "DELETE FROM sessions",
        "DELETE FROM budgets WHERE epsilon = 2.0",
        "DELETE FROM meta",
        "DROP TABLE sessions",
        "UPDATE releases SET noise_multiplier = 20.0",
        "UPDATE releases SET sampling_rate = 0.01",
        "UPDATE releases SET noise_is_private = 1",
        "UPDATE releases SET mode = 'client' WHERE round_index = 0",
        "UPDATE releases SET steps = 0 WHERE round_index = 1",
        "UPDATE budgets SET epsilon = 40.0",
        "UPDATE budgets SET unit = 'client'",
        "UPDATE meta SET entries = 0",
        "INSERT INTO budgets VALUES (6, 40.0, 1e-5, 'record', '', '')",
        "INSERT INTO releases VALUES (6, 'fake', 0, 2.0, 1.0, 1, 'local', 1, NULL)",
    ],
)
def test_a_row_changed_by_hand_is_an_error_for_old_and_new_readers(tmp_path, edit):
    book = ledger(tmp_path, epsilon=math.inf)
    book.begin_session("run", 0, 0)
    book.release("run", 0, STEP, UPDATE)
    book.release("run", 1, STEP, UPDATE, noise_is_private=False)
    book.open_round("run", 0)
    book.set_budget(Budget(2.0, 1e-5))
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with connection:
        connection.execute(edit)
    connection.close()
    with pytest.raises(LedgerError):
        Ledger(tmp_path)


def test_an_unchained_ledger_would_have_taken_the_edit(tmp_path, monkeypatch):
    """The broken variant, which shows what the chain is for."""
    ledger(tmp_path).release("run", 0, STEP, UPDATE)
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with connection:
        connection.execute("DELETE FROM releases")
    connection.close()
    monkeypatch.setattr(LedgerFile, "_verified", lambda self, connection: self._seen)
    assert Ledger(tmp_path).spent() == 0.0


@pytest.mark.parametrize(
    ("written", "message", "hint"),
    [
        ("fedpt-secure ledger 1", "earlier version", "set-budget"),
        ("fedpt-secure ledger 3", "later version", "upgrade"),
        ("groceries 2", "not a ledger", ""),
    ],
)
def test_a_ledger_of_another_version_or_program_is_refused_by_name(tmp_path, written, message, hint):
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with connection:
        connection.execute("CREATE TABLE meta (format TEXT NOT NULL) STRICT")
        connection.execute("INSERT INTO meta VALUES (?)", (written,))
    connection.close()
    before = (tmp_path / "ledger.sqlite").read_bytes()
    for opened in (Ledger, ledger):
        with pytest.raises(LedgerError, match=message) as caught:
            opened(tmp_path)
        assert hint in caught.value.hint
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


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


FORK = multiprocessing.get_context("fork")


def _release_and_die(directory, moment):
    """Be killed before the commit, within it, or after it."""
    book = ledger(directory)
    die = lambda *arguments, **keywords: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if moment == "before the commit":
        original = ledger_file.append

        def dying(*arguments, **keywords):
            original(*arguments, **keywords)
            die()

        import fedpt_secure.privacy.ledger as module

        module.append = dying
    book.release("run", 0, STEP, None, mode="distributed")
    die()


@pytest.mark.parametrize(("moment", "counted"), [("before the commit", 0), ("after the commit", 1)])
def test_a_killed_process_has_counted_what_it_committed(tmp_path, moment, counted):
    process = FORK.Process(target=_release_and_die, args=(tmp_path, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(Ledger(tmp_path).releases("run")) == counted


def _release_then_send(directory, barrier, wire):
    book = ledger(directory, epsilon=math.inf)
    barrier.wait(60)
    for index in range(10_000):
        book.release("run", index, STEP, None, mode="distributed")
        os.write(wire, b"u")


def test_a_client_killed_at_any_moment_has_never_sent_more_than_it_counted(tmp_path):
    """`kill -9` from outside at random moments; what was sent is counted by the kernel, not by the process."""
    for trial in range(5):
        directory = tmp_path / str(trial)
        ledger(directory, epsilon=math.inf)
        receive, send = os.pipe()
        barrier = FORK.Barrier(2)
        process = FORK.Process(target=_release_then_send, args=(directory, barrier, send))
        process.start()
        os.close(send)
        barrier.wait(60)
        time.sleep(0.1 + 0.037 * trial)
        process.kill()
        process.join(60)
        sent = 0
        while chunk := os.read(receive, 65536):
            sent += len(chunk)
        os.close(receive)
        counted = len(Ledger(directory).releases("run"))
        assert sent <= counted <= sent + 1
        assert counted > 0


def _spend(directory, name, barrier, results):
    book = Ledger(directory)
    spent = 0
    barrier.wait(60)
    for index in range(4):
        try:
            book.release(name, index, STEP, UPDATE, mode="local", noise_is_private=True)
            spent += 1
        except BudgetExceeded:
            break
    results.put(spent)


def test_processes_on_one_ledger_together_never_pass_its_budget(tmp_path):
    """Three processes released at once by a barrier; room for exactly three of their twelve releases."""
    ledger(tmp_path, epsilon=epsilon_spent((GaussianSteps(2.0, 1.0, 3),), delta=1e-5))
    barrier, results = FORK.Barrier(3), FORK.Queue()
    processes = [FORK.Process(target=_spend, args=(tmp_path, f"run {index}", barrier, results)) for index in range(3)]
    for process in processes:
        process.start()
    total = sum(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert total == 3
    assert Ledger(tmp_path).history() == (GaussianSteps(2.0, 1.0, 3),)


def _create(directory, epsilon, barrier, results):
    barrier.wait(60)
    results.put((epsilon, ledger(directory, epsilon).budget.epsilon))


def test_of_two_processes_that_begin_one_ledger_both_get_the_same(tmp_path):
    barrier, results = FORK.Barrier(2), FORK.Queue()
    processes = [FORK.Process(target=_create, args=(tmp_path, epsilon, barrier, results)) for epsilon in (1.0, 2.0)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found[1.0] == found[2.0] == Ledger(tmp_path).budget.epsilon
    assert len(Ledger(tmp_path).budgets()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []
