"""Ledgers that outlive runs: one budget per client's data, whoever asks, however often, killed or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal

import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import LedgerError, RoundError
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.privacy import Budget, Ledger
from fedpt_secure.progress import SILENT


@pytest.fixture
def with_ledgers(tiny_settings, tmp_path):
    """Settings of a run whose ledgers outlive it, all clients in every round."""
    return {**tiny_settings, "federation": {"rounds": 2, "cohort": 5, "ledgers": str(tmp_path / "ledgers")}}


@pytest.fixture(scope="module")
def first_run():
    """Filled by the first test that needs it: a finished run and a copy of the ledgers it left."""
    return {}


@pytest.fixture
def after_one_run(with_ledgers, tmp_path, first_run, tmp_path_factory):
    """The ledgers as a first run left them, with budgets that hold five such runs; what the first run said."""
    if not first_run:
        result = train(with_ledgers, tmp_path / "first", privacy={"budget_epsilon": 20.0})
        first_run["copy"] = tmp_path_factory.mktemp("kept") / "ledgers"
        first_run["result"] = result
        shutil.copytree(tmp_path / "ledgers", first_run["copy"])
        shutil.rmtree(tmp_path / "ledgers")
    shutil.copytree(first_run["copy"], tmp_path / "ledgers")
    return first_run["result"]


def cap(tmp_path):
    """Every owner allows no more than is spent by now."""
    for book in ledgers(tmp_path).values():
        book.set_budget(Budget(max(0.1, book.spent()), 1e-5))


def train(settings, path, **groups):
    merged = {**settings, **{name: {**settings.get(name, {}), **group} for name, group in groups.items()}}
    config = build(RunConfig, merged)
    directory = RunDirectory.create(path, config)
    return run_training(config, directory, cache=Cache(path.parent / "cache"), progress=SILENT)


def ledgers(tmp_path):
    return {path.name: Ledger(path) for path in (tmp_path / "ledgers").iterdir() if path.is_dir()}


def test_a_second_run_on_the_same_ledgers_finds_the_budget_spent(after_one_run, with_ledgers, tmp_path):
    spent = {name: book.spent() for name, book in ledgers(tmp_path).items()}
    assert max(spent.values()) <= after_one_run.statement.epsilon <= 4.0
    cap(tmp_path)
    with pytest.raises(RoundError, match=r"all 2 rounds were aborted.* declined: . for budget") as caught:
        train(with_ledgers, tmp_path / "second")
    assert "over their own budgets" in caught.value.hint
    assert {name: book.spent() for name, book in ledgers(tmp_path).items()} == spent
    lines = [json.loads(line) for line in (tmp_path / "second" / "transcript.jsonl").read_text().splitlines()]
    assert all(set(line["declined"].values()) == {"budget"} for line in lines)
    assert not (tmp_path / "second" / "privacy.json").exists()
    told = (tmp_path / "second" / "transcript.jsonl").read_text()  # what it spent elsewhere stays with a client
    assert "epsilon" not in told
    assert "its budget is" not in told


def test_another_seed_does_not_begin_new_ledgers(after_one_run, with_ledgers, tmp_path):
    """Another seed holds other records out; the records' owners, and their ledgers, stay the same."""
    cap(tmp_path)
    with pytest.raises(RoundError, match="for budget"):
        train({**with_ledgers, "seed": 4}, tmp_path / "second")


def test_a_larger_budget_lasts_for_more_runs_and_all_of_them_are_counted(after_one_run, with_ledgers, tmp_path):
    second = train(with_ledgers, tmp_path / "second", privacy={"budget_epsilon": 0.001})
    assert second.statement.epsilon == after_one_run.statement.epsilon  # a statement is about its run
    books = ledgers(tmp_path).values()
    assert 4.0 < max(book.spent() for book in books) <= 20.0
    for book in books:
        assert book.budget.epsilon == 20.0  # the second run's wish is none of the owner's
        assert len(book.runs()) == 2


def test_one_client_whose_owner_allows_nothing_more_declines_and_the_others_go_on(
    after_one_run, with_ledgers, tmp_path
):
    stopped = next(iter(sorted(ledgers(tmp_path).items())))[1]
    stopped.set_budget(Budget(0.1, 1e-5, set_by="the owner"))
    second = train(with_ledgers, tmp_path / "second")
    declined = [line["declined"] for line in second.transcripts]
    assert any(declined)
    assert set().union(*(line.values() for line in declined)) == {"budget"}
    assert len(set().union(*declined)) == 1
    assert len(stopped.runs()) == 1


def test_record_level_work_is_declined_by_owners_who_protect_everything_they_have(
    after_one_run, with_ledgers, tmp_path
):
    for path in (tmp_path / "ledgers").iterdir():
        if path.is_dir():
            (path / "ledger.sqlite").unlink()
            Ledger.create(path, budget=Budget(100.0, 1e-5, "client"))
    with pytest.raises(RoundError, match=r"declined: . for unit"):
        train(with_ledgers, tmp_path / "second")


def test_records_that_found_other_owners_are_refused(with_ledgers, tmp_path):
    """Else a record that moved to another client would have a second budget."""
    dealt = {
        **with_ledgers,
        "data": {"source": with_ledgers["data"]["source"], "text_column": "said", "clients": 6, "partition": "equal"},
    }
    train(dealt, tmp_path / "first", privacy={"budget_epsilon": 20.0})
    for other in ({**dealt, "seed": 4}, with_ledgers):
        with pytest.raises(LedgerError, match="in another way") as caught:
            train(other, tmp_path / f"other-{other['seed']}")
        assert "--ledgers" in caught.value.hint


def test_an_audited_run_is_charged_to_the_ledgers_of_the_same_data(with_ledgers, tmp_path):
    """Planted records are nobody's own. If they changed whose ledgers these are, an audited run would need others, and
    with them every real record a second budget."""
    dealt = {
        **with_ledgers,
        "data": {"source": with_ledgers["data"]["source"], "text_column": "said", "clients": 6, "partition": "equal"},
    }
    train(dealt, tmp_path / "plain", privacy={"budget_epsilon": 20.0})
    audited = train({**dealt, "audit": {"canaries": 12}}, tmp_path / "audited")
    assert all(len(book.runs()) == 2 for book in ledgers(tmp_path).values())
    # And beside it: what such a run says of itself, and who can read what it keeps.
    assert any("12 canaries" in item for item in audited.statement.not_covered)
    assert "12 canaries" in (tmp_path / "audited" / "adapter" / "README.md").read_text()
    assert "canaries" not in (tmp_path / "plain" / "privacy.json").read_text()
    assert not (tmp_path / "plain" / "audit").exists()


@pytest.mark.parametrize("content", [None, "scrambled", "[]"])
def test_a_directory_for_ledgers_that_lost_its_binding_is_an_error(after_one_run, with_ledgers, tmp_path, content):
    binding = tmp_path / "ledgers" / "ledgers.json"
    binding.unlink() if content is None else binding.write_text(content)
    with pytest.raises(LedgerError):
        train(with_ledgers, tmp_path / "second")


def test_the_path_is_made_absolute_so_that_no_later_run_misses_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = build(RunConfig, {"federation": {"ledgers": "books"}})
    assert config.federation.ledgers == str(tmp_path / "books")


def _train_and_die(settings, path, calls):
    release, count = Ledger.release, 0

    def dying(*arguments, **keywords):
        nonlocal count
        release(*arguments, **keywords)
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.release = dying
    train(settings, path)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_run_killed_between_commit_and_send_has_spent_what_it_committed(mode, with_ledgers, tmp_path):
    """The third client's release is committed and never sent; the ledgers count it, in the other runs' budgets too."""
    settings = {**with_ledgers, "privacy": {"mode": mode, "budget_epsilon": 20.0}}
    process = multiprocessing.get_context("fork").Process(target=_train_and_die, args=(settings, tmp_path / "run", 3))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    counted = sorted(len(book.releases(run)) for book in ledgers(tmp_path).values() for run in book.runs())
    assert counted == [1, 1, 1]
    directory = RunDirectory.open(tmp_path / "run")
    result = run_training(directory.config(), directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    books = ledgers(tmp_path).values()
    released = [release.round_index for book in books for run in book.runs() for release in book.releases(run)]
    sent = [line["round"] for line in result.transcripts for _ in line["survivors"]]
    assert all(released.count(round_index) >= sent.count(round_index) for round_index in (0, 1))
    if mode == "distributed":  # what was committed before the crash is never sent again
        assert released.count(0) >= 3
        assert len(result.transcripts[0]["dropped"]) == 3
