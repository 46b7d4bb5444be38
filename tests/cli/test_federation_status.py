"""`federation status`: what is on disk, for people and for programs."""

from __future__ import annotations

import json
import os
import threading

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import federation_status
from fedpt_secure.cli.app import app
from fedpt_secure.network.status import ClientLine, StatusFile, new_status


@pytest.fixture
def status_file(tmp_path):
    clients = {
        "clinic [b]": ClientLine(reachable=True, phase="mask", outcome="answered", rounds=2, epsilon=1.235),
        "other": ClientLine(dropped=1),
    }
    file = StatusFile(tmp_path / "status.json", new_status("server", clients))
    file.status.state, file.status.rounds, file.status.round_index, file.status.phase = "round", 5, 2, "mask"
    file.write(now=True)
    return file


def run(*arguments):
    return CliRunner().invoke(app, ["federation", "status", *map(str, arguments)], env={"COLUMNS": "200"})


def test_clients_phases_dropouts_and_epsilon_are_shown(status_file, tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 0
    row = next(line for line in result.output.splitlines() if "clinic [b]" in line)
    assert [cell.strip() for cell in row.split("│")[1:8]] == [
        "clinic [b]",
        "yes",
        "mask",
        "answered",
        "2",
        "0",
        "1.235",
    ]
    assert "round 2 of 5, mask" in result.output


def test_json_is_the_status_and_whether_its_process_lives(status_file, tmp_path):
    found = json.loads(run(tmp_path, "--json").output)
    assert (found["state"], found["running"], found["pid"]) == ("round", True, os.getpid())
    assert found["clients"]["clinic [b]"]["epsilon"] == 1.235


def test_a_killed_process_is_told(status_file, tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    status_file.status.pid = child
    status_file.write(now=True)
    assert "its process is gone" in run(tmp_path).output
    assert json.loads(run(tmp_path, "--json").output)["running"] is False


def test_watching_ends_with_the_run(status_file, tmp_path, capsys):
    stop = threading.Event()
    timer = threading.Timer(0.5, lambda: (setattr(status_file.status, "state", "done"), status_file.write(now=True)))
    timer.start()
    federation_status.show(tmp_path, watch=True, as_json=False, stop=stop)
    timer.join()
    assert "server: done" in capsys.readouterr().out


def test_nothing_started_yet_is_a_clear_error(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 8
    assert "has it been started yet?" in result.output.replace("\n", " ")
