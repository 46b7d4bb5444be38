"""The audit as a whole: its result, its exit, its resumption."""

from __future__ import annotations

import json

import pytest

from fedpt_secure.attacks import SCHEMA
from fedpt_secure.errors import RunDirectoryError

QUICK = ("accounting", "membership")


def test_a_correct_run_is_not_called_a_violation_and_the_result_is_one_json_object(finished, audit):
    directory = finished()
    result = audit(directory, parts=QUICK)
    assert result["schema"] == SCHEMA
    assert result["verdict"]["violation"] is False
    assert result["verdict"]["sentence"].startswith("no violation detected")
    assert json.loads((directory.path / "audit" / "audit.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["parts"]) == set(QUICK)
    views = result["parts"]["membership"]["views"]
    assert [(view["view"], view["answers"]) for view in views] == [
        ("released_adapter", None),
        ("endpoint", "full"),
        ("endpoint", "top_k"),
        ("endpoint", "token"),
    ]
    assert [len(view["attacks"]) for view in views] == [5, 5, 4, 2]


def test_a_bare_run_held_to_epsilon_4_is_a_violation(finished, audit):
    bare = finished(privacy={"epsilon": float("inf")})
    result = audit(bare, parts=("accounting",), claimed_epsilon=4.0)
    assert result["verdict"]["violation"] is True
    assert result["verdict"]["violations"] == ["accounting"]
    assert audit(bare, parts=("accounting",))["verdict"]["violation"] is False  # it claims nothing


def test_an_audits_folder_is_closed_to_others_also_where_nothing_was_planted(finished, audit):
    bare = finished(privacy={"epsilon": float("inf")}, audit={"canaries": 0, "secrets": 0, "record_server_view": False})
    audit(bare, parts=("accounting",))
    assert (bare.path / "audit").stat().st_mode & 0o077 == 0


def test_a_run_that_is_held_to_less_than_it_spent_is_a_violation(finished, audit):
    directory = finished()
    assert audit(directory, parts=("accounting",), claimed_epsilon=4.0)["verdict"]["violation"] is False
    assert audit(directory, parts=("accounting",), claimed_epsilon=2.0)["verdict"]["violation"] is True


def test_an_audit_goes_on_from_parts_that_are_done(finished, audit, monkeypatch):
    directory = finished()
    first = audit(directory, parts=("accounting",))
    monkeypatch.setattr("fedpt_secure.attacks.audit._RUNNERS", {"accounting": lambda audit: 1 / 0})
    again = audit(directory, parts=("accounting",))
    assert again["parts"] == first["parts"]
    with pytest.raises(ZeroDivisionError):
        audit(directory, parts=("accounting",), fresh=True)
    with pytest.raises(ZeroDivisionError):
        audit(directory, parts=("accounting",), claimed_epsilon=3.0)  # another audit


def test_a_budget_chooses_sizes_and_says_what_that_cost(finished, audit):
    result = audit(finished(), parts=("membership",), budget_seconds=0.5)
    chosen, wanted = result["budget"]["sizes"]["membership at the endpoint, records a class"]
    assert chosen < wanted
    assert any("membership at the endpoint" in line for line in result["budget"]["cost_in_power"])


def test_a_run_that_is_not_finished_is_refused(finished, audit):
    directory = finished()
    (directory.path / "privacy.json").unlink()
    with pytest.raises(RunDirectoryError, match="not a finished run"):
        audit(directory)


def test_lost_coins_are_an_error_not_an_audit_without_canaries(finished, audit):
    directory = finished()
    (directory.path / "audit" / "planted.json").unlink()
    with pytest.raises(RunDirectoryError, match="planted"):
        audit(directory)
