"""`fedpt-secure ledger`: what an owner sees, what an owner may change, and how each refusal ends."""

from __future__ import annotations

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.privacy import GaussianSteps, Ledger

RUNNER = CliRunner()


def invoke(*arguments):
    return RUNNER.invoke(app, ["ledger", *(str(argument) for argument in arguments)])


@pytest.fixture
def book(tmp_path):
    """Begun by its owner on the command line, then used."""
    result = invoke("set-budget", tmp_path / "alice", "--epsilon", 4, "--create", "--by", "alice herself")
    assert result.exit_code == 0, result.output
    ledger = Ledger(tmp_path / "alice")
    for round_index in range(2):
        ledger.release(
            "ab" * 16, round_index, GaussianSteps(3.0, 1.0, 1), None, mode="distributed", noise_is_private=True
        )
    return tmp_path / "alice"


def test_show_prints_releases_spend_budget_and_what_is_left(book):
    result = invoke("show", book)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    for part in ("ab" * 16, "distributed", "epsilon <=", "delta = 1e-05", "each record", "neighbouring:", "against"):
        assert part in flat
    assert "Accountant:" in flat
    assert "Budget: epsilon 4" in flat
    assert "by alice herself" in flat
    assert "Left:" in flat


def test_json_agrees_with_the_ledger(book):
    content = json.loads(invoke("show", book, "--json").stdout)["ledgers"]
    assert len(content) == 1
    assert content[0]["spent"]["epsilon"] >= Ledger(book).spent()
    assert content[0]["runs"][0]["releases"] == 2
    assert content[0]["budget"]["set_by"] == "alice herself"


def test_several_ledgers_are_a_table(book):
    invoke("set-budget", book.parent / "bob", "--epsilon", 1, "--create")
    result = invoke("show", book.parent)
    assert "alice" in result.stdout
    assert "bob" in result.stdout


def test_a_raise_needs_the_owners_word_and_every_budget_stays_visible(book):
    refused = invoke("set-budget", book, "--epsilon", 8)
    assert refused.exit_code == 6
    assert "--confirm-raise" in refused.stderr
    assert invoke("set-budget", book, "--epsilon", 8, "--confirm-raise").exit_code == 0
    flat = " ".join(invoke("show", book).stdout.split())
    assert "Budget: epsilon 8" in flat
    assert "Before: epsilon 4" in flat


def test_a_budget_below_what_is_spent_is_set_with_a_note(book):
    result = invoke("set-budget", book, "--epsilon", 0.5)
    assert result.exit_code == 0
    assert "declines all further work" in result.stderr
    assert "Left: 0." in result.stdout


def _old(path):
    path.unlink()
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE meta (format TEXT NOT NULL) STRICT")
        connection.execute("INSERT INTO meta VALUES ('fedpt-secure ledger 1')")
    connection.close()


def _edited(path):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DELETE FROM releases WHERE round_index = 1")
    connection.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be used"),
        (lambda path: path.write_bytes(b"not a ledger" * 500), "cannot be used"),
        (_old, "earlier version"),
        (_edited, "do not fit their chain"),
        (lambda path: path.unlink(), "no ledger in"),
    ],
)
@pytest.mark.parametrize("command", ["show", "set-budget"])
def test_a_ledger_that_cannot_be_trusted_is_an_error_and_stays_as_it_is(book, damage, message, command):
    path = book / "ledger.sqlite"
    damage(path)
    before = path.read_bytes() if path.exists() else None
    result = invoke(command, book, *(("--epsilon", 1) if command == "set-budget" else ()))
    assert result.exit_code == 6
    assert message in result.stderr
    assert "hint:" in result.stderr
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("arguments", [("--epsilon", "nan"), ("--epsilon", 0), ("--epsilon", 1, "--unit", "person")])
def test_what_is_no_budget_is_refused(book, arguments):
    result = invoke("set-budget", book, *arguments)
    assert result.exit_code == 6
    assert len(Ledger(book).budgets()) == 1


def test_a_second_run_on_the_same_ledgers_is_declined_and_says_why(tiny_models, chat_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    train = [
        *("train", "--data", chat_file, "--client-column", "who", "--text-column", "said"),
        *("--small", tiny_models["small"], "--large", tiny_models["large"], "--device", "cpu"),
        *("--context-length", 12, "--rounds", 1, "--cohort", 5, "--lora-rank", 2, "--evaluation-records", 10),
        *("--ledgers", "books"),
    ]
    first = RUNNER.invoke(app, [*map(str, train), "--out", "first"])
    assert first.exit_code == 0, first.output
    assert not (tmp_path / "first" / "clients").exists()
    second = RUNNER.invoke(app, [*map(str, train), "--out", "second"])
    assert second.exit_code == 7
    assert "of 5 clients 5 declined: 5 for budget" in second.stderr
    assert "5 clients are over their own budgets" in second.stderr
    shown = json.loads(invoke("show", "books", "--json").stdout)["ledgers"]
    assert sum(len(item["runs"]) for item in shown) == 5
    assert all(item["spent"]["epsilon"] <= 4.0 for item in shown)
