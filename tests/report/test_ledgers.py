"""A ledger's summary: never less than was spent, never more left than there is."""

from __future__ import annotations

import json
import math

import pytest

from fedpt_secure.errors import LedgerError, PrivacyError
from fedpt_secure.privacy import Budget, GaussianSteps, Ledger, epsilon_spent
from fedpt_secure.report import change_budget, find_ledgers, summarise_ledger

STEP = GaussianSteps(4.0, 1.0, 1)


def ledger(directory, epsilon=4.0, unit="record"):
    return Ledger.create(directory, budget=Budget(epsilon, 1e-5, unit))


def release(book, run, round_index, *, mode="distributed", private=True, spent=STEP):
    book.release(run, round_index, spent, None, mode=mode, noise_is_private=private)


def test_what_is_spent_is_rounded_up_and_what_is_left_down(tmp_path):
    book = ledger(tmp_path)
    release(book, "a", 0)
    release(book, "a", 1)
    release(book, "b", 0)
    summary = summarise_ledger(tmp_path)
    spent = epsilon_spent((GaussianSteps(4.0, 1.0, 3),), delta=1e-5)
    assert spent <= summary.epsilon <= spent + 0.001
    assert 4.0 - spent - 0.003 <= summary.left <= 4.0 - spent
    assert [(run.run_id, run.releases, run.steps) for run in summary.runs] == [("a", 2, 2), ("b", 1, 1)]
    assert all(run.epsilon < summary.epsilon for run in summary.runs)


def test_every_number_says_what_it_means(tmp_path):
    release(ledger(tmp_path), "a", 0)
    summary = summarise_ledger(tmp_path)
    for part in (
        f"epsilon <= {summary.epsilon:g}",
        "delta = 1e-05",
        "record",
        "add or remove",
        "against",
        "Accountant",
    ):
        assert part in summary.claim()


def test_a_release_with_noise_from_a_seed_promises_nothing_and_leaves_nothing(tmp_path):
    book = ledger(tmp_path, epsilon=math.inf)
    release(book, "a", 0)
    release(book, "b", 0, private=False)
    book.set_budget(Budget(4.0, 1e-5))
    summary = summarise_ledger(tmp_path)
    assert (summary.epsilon, summary.left) == (None, 0.0)
    assert [run.epsilon is None for run in summary.runs] == [False, True]
    assert "NOTHING IS PROMISED" in summary.claim()


def test_a_client_level_release_costs_a_record_more_than_it_costs_the_client(tmp_path):
    for unit in ("record", "client"):
        release(ledger(tmp_path / unit, unit=unit), "a", 0, mode="client")
    assert summarise_ledger(tmp_path / "record").epsilon > summarise_ledger(tmp_path / "client").epsilon


def test_it_is_json_without_infinities(tmp_path):
    book = ledger(tmp_path, epsilon=math.inf)
    release(book, "a", 0, spent=GaussianSteps(0.0, 1.0, 1))
    content = json.loads(json.dumps(summarise_ledger(tmp_path).to_json(), allow_nan=False))
    assert (content["budget"]["epsilon"], content["left"], content["spent"]["epsilon"]) == (None, None, None)


def test_ledgers_are_found_in_their_own_directory_a_run_and_what_outlives_runs(tmp_path):
    for place in ("run/clients/00000", "run/clients/00001", "books/alice", "books/bob"):
        ledger(tmp_path / place)
    assert find_ledgers(tmp_path / "books" / "bob") == [tmp_path / "books" / "bob"]
    assert [path.name for path in find_ledgers(tmp_path / "books")] == ["alice", "bob"]
    assert [path.name for path in find_ledgers(tmp_path / "run")] == ["00000", "00001"]
    for empty in ("nowhere", "run/clients/00000/ledger.sqlite"):
        with pytest.raises(LedgerError, match="no ledger in"):
            find_ledgers(tmp_path / empty)


SAME = {"delta": None, "unit": None, "by": "", "create": False, "confirm_raise": False}


def test_what_is_not_given_stays_as_it_was(tmp_path):
    Ledger.create(tmp_path, budget=Budget(4.0, 1e-7, "client"))
    change_budget(tmp_path, **{**SAME, "by": "ward 3"}, epsilon=2.0)
    budget = Ledger(tmp_path).budget
    assert (budget.epsilon, budget.delta, budget.unit, budget.set_by) == (2.0, 1e-7, "client", "ward 3")


def test_a_ledger_is_begun_only_when_asked_and_never_over_one_that_is_there(tmp_path):
    with pytest.raises(LedgerError, match="no ledger"):
        change_budget(tmp_path / "new", **SAME, epsilon=2.0)
    assert not (tmp_path / "new").exists()
    change_budget(tmp_path / "new", **{**SAME, "create": True}, epsilon=2.0)
    with pytest.raises(PrivacyError, match="allows more"):
        change_budget(tmp_path / "new", **{**SAME, "create": True}, epsilon=3.0)
    assert len(Ledger(tmp_path / "new").budgets()) == 1


def test_an_unknown_unit_or_a_delta_of_zero_is_refused(tmp_path):
    for changes in ({"unit": "person"}, {"delta": 0.0}):
        with pytest.raises(PrivacyError):
            change_budget(tmp_path, **{**SAME, "create": True, **changes}, epsilon=2.0)
    assert list(tmp_path.iterdir()) == []
