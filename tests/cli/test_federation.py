"""`fedpt-secure federation`: what can be seen without a network."""

from __future__ import annotations

import json
import tomllib

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli.app import app
from fedpt_secure.flower import compatibility


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["federation", *map(str, arguments)], input=stdin)


def test_a_test_network_says_what_to_run_and_everybody_has_the_settings(tmp_path):
    (tmp_path / "run.toml").write_text("[federation]\nrounds = 5\n[privacy]\nepsilon = 9.0\n")
    made = run("init", tmp_path / "fed", "--clients", 3, "--config", tmp_path / "run.toml", "--epsilon", 2, "--json")
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert set(result["clients"]) == {"client-0", "client-1", "client-2"}
    for place in (result["server"], *result["clients"].values()):
        config = tomllib.loads((tmp_path / place / "config.toml").read_text())
        assert (config["federation"]["rounds"], config["privacy"]["epsilon"]) == (5, 2.0)
        assert (config["data"]["clients"], config["data"]["partition"]) == (3, "equal")


def test_the_commands_that_are_printed_are_commands(tmp_path):
    made = run("init", tmp_path / "fed", "--clients", 3)
    commands = [line.split() for line in made.stdout.splitlines() if line.startswith("  fedpt-secure ")]
    assert len(commands) == 6
    for command in commands:
        assert CliRunner().invoke(app, [*command[1:-1], "--help"]).exit_code == 0
        assert (tmp_path / command[-1]).is_dir()


def test_owners_named_by_the_data_are_the_clients(tmp_path, chat_file):
    (tmp_path / "run.toml").write_text(f'[data]\nsource = "{chat_file}"\nclient_column = "who"\ntext_column = "said"\n')
    made = run("init", tmp_path / "fed", "--clients", 4, "--config", tmp_path / "run.toml", "--json")
    assert set(json.loads(made.stdout)["clients"]) == {f"person {index}" for index in range(4)}
    too_many = run("init", tmp_path / "more", "--clients", 7, "--config", tmp_path / "run.toml")
    assert too_many.exit_code == 2
    assert "6 owners" in too_many.stderr
    assert not (tmp_path / "more").exists()


def test_one_sides_of_organisations_fit_together(tmp_path):
    from fedpt_secure.network.folder import ClientFolder, ServerFolder

    assert run("init", tmp_path / "server", "--server", "--host", "fed.example.org", "--rounds", 3).exit_code == 0
    config = tmp_path / "server" / "config.toml"
    public = []
    for client in ("org a", "org b", "org c"):
        arguments = ("--client-id", client, "--host", "fed.example.org", "--config", config, "--no-passphrase")
        made = run("init", tmp_path / client, *arguments, "--records", "mine.jsonl", "--text-column", "said", "--json")
        assert made.exit_code == 0, made.output
        handed = json.loads(made.stdout)["hand_out"]
        public.append(handed[0])
        assert not any("secret" in name or name.endswith("node.key") for name in handed)
        settings = ClientFolder(tmp_path / client).settings()
        assert (settings.server.address, settings.data.source) == ("fed.example.org:8000", "mine.jsonl")
        assert (tmp_path / client / "config.toml").read_bytes() == config.read_bytes()
    roster = tmp_path / "server" / "roster.json"
    assert CliRunner().invoke(app, ["keys", "roster", *public, "--out", str(roster)]).exit_code == 0
    assert list(ServerFolder(tmp_path / "server").roster()) == ["org a", "org b", "org c"]


def test_a_client_without_a_budget_is_refused(tmp_path):
    made = run("init", tmp_path / "x", "--client-id", "a", "--no-passphrase")
    assert made.exit_code == 2
    assert "--budget-epsilon" in made.stderr
    assert not (tmp_path / "x").exists()


def test_a_clients_own_budget_is_in_its_ledger_and_the_settings_are_still_to_come(tmp_path):
    made = run("init", tmp_path / "x", "--client-id", "a", "--no-passphrase", "--budget-epsilon", 3, "--json")
    assert json.loads(made.stdout)["budget_epsilon"] == 3
    assert json.loads(made.stdout)["wanted"] == ["roster.json", "config.toml", "ca.crt"]
    assert not (tmp_path / "x" / "config.toml").exists()
    assert "3" in CliRunner().invoke(app, ["ledger", "show", str(tmp_path / "x" / "ledger")]).stdout


def test_a_signing_key_is_sealed_unless_asked_otherwise(tmp_path):
    arguments = ("--client-id", "a", "--budget-epsilon", 3)
    assert run("init", tmp_path / "x", *arguments, stdin="correct horse\ncorrect horse\n").exit_code == 0
    assert "sealed" in (tmp_path / "x" / "identity.secret.json").read_text()
    assert run("init", tmp_path / "y", *arguments, stdin="one\nanother\n").exit_code != 0
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one of"),
        (("--clients", 3, "--server"), "give one of"),
        (("--server", "--host", "example.org", "--insecure"), "127.0.0.1 only"),
        (("--server", "--host", "localhost", "--insecure"), "127.0.0.1 only"),
        (("--server", "--records", "x"), "one client's side"),
        (("--clients", 3, "--epsilon", -1), "epsilon"),
        (("--clients", 3, "--config", "/nowhere.toml"), "/nowhere.toml"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, arguments, says):
    made = run("init", tmp_path / "x", *arguments)
    assert made.exit_code == 2
    assert says in made.stderr
    assert not (tmp_path / "x").exists()


def test_insecure_is_said_in_so_many_words(tmp_path):
    made = run("init", tmp_path / "x", "--clients", 3, "--insecure")
    assert made.exit_code == 0
    assert "INSECURE" in made.stderr


def test_nothing_is_replaced(tmp_path):
    assert run("init", tmp_path / "x", "--clients", 3).exit_code == 0
    again = run("init", tmp_path / "x", "--clients", 3)
    assert again.exit_code == 2
    assert "nothing is replaced" in again.stderr


def test_a_renewed_certificate_says_until_when(tmp_path):
    run("init", tmp_path / "x", "--server")
    renewed = run("renew", tmp_path / "x", "--json")
    assert renewed.exit_code == 0
    assert json.loads(renewed.stdout)["until"].startswith("20")


@pytest.mark.parametrize("command", ["server", "client", "run"])
def test_a_folder_that_is_none_and_a_missing_extra_are_told_apart(tmp_path, monkeypatch, command):
    assert "federation.toml cannot be read" in (result := run(command, tmp_path)).stderr
    assert result.exit_code == 2
    monkeypatch.setattr(compatibility.util, "find_spec", lambda name: None)
    assert 'pip install "fedpt-secure[flower]"' in (result := run(command, tmp_path)).stderr
    assert result.exit_code == 2


def test_a_run_without_a_server_says_so(tmp_path):
    run("init", tmp_path / "x", "--server", "--port", 9)
    result = run("run", tmp_path / "x")
    assert result.exit_code == 7
    assert "federation server` running?" in result.stderr


def test_a_server_without_a_roster_is_refused(tmp_path):
    run("init", tmp_path / "x", "--server")
    result = run("server", tmp_path / "x")
    assert result.exit_code == 11
    assert "roster.json" in result.stderr
