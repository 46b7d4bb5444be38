"""Programs that are kept running, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedpt_secure.errors import ConfigError
from fedpt_secure.flower import processes
from fedpt_secure.flower.processes import Group, Program, born, child_environment, sole_keeper, start_tethered

SLEEPER = """
import json, os, sys, time
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(float(sys.argv[2]))
"""
KEEPER = """
import sys, threading
from pathlib import Path
from fedpt_secure.flower.processes import Group, Program
place = Path(sys.argv[1])
Group(place, lambda: [Program("one", "sleeper", (str(place / "pids"), "600"))], print).keep(threading.Event())
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder whose children can run `sleeper`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sleeper.py").write_text(SLEEPER)
    paths = [str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(processes, "_SHORTEST_PAUSE_SECONDS", 0.1)
    (tmp_path / "flower").mkdir()
    return tmp_path / "flower"


def pids(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.02)


def kept(place, programs, note=lambda text: None):
    stop = threading.Event()
    thread = threading.Thread(target=Group(place, lambda: programs, note).keep, args=(stop,))
    thread.start()
    return stop, thread


def test_the_path_of_children_holds_nothing_to_start(place, monkeypatch):
    monkeypatch.setenv("FLWR_APP_TOKEN", "somebody's")
    environment = child_environment(place)
    assert os.pathsep not in environment["PATH"]
    assert os.listdir(environment["PATH"]) == []
    assert {key: environment[key] for key in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    assert environment["FLWR_HOME"].startswith(str(place))
    assert "FLWR_APP_TOKEN" not in environment
    (place / "nothing" / "flwr-clientapp").touch()
    with pytest.raises(ConfigError, match="must be empty"):
        child_environment(place)


def test_no_proxy_stands_between_processes_of_this_machine_and_no_header_makes_a_stranger_local(place, monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    environment = child_environment(place)
    assert environment["FORWARDED_ALLOW_IPS"] == "127.0.0.1"
    assert environment["NO_PROXY"] == "intranet,127.0.0.1,::1,localhost"
    assert environment["no_proxy"] == "127.0.0.1,::1,localhost"
    assert environment["HTTP_PROXY"] == "http://proxy:3128"


def test_what_cannot_be_started_is_tried_again(place):
    notes, failures = [], [OSError(28, "No space left on device")]

    def programs():
        if failures:
            raise failures.pop()
        return []

    stop = threading.Event()
    group = Group(place, programs, notes.append)
    thread = threading.Thread(target=group.keep, args=(stop,))
    thread.start()
    end = time.monotonic() + 20
    while failures and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert thread.is_alive()
    stop.set()
    thread.join(20)
    assert "not started: No space left on device" in notes[0]


def test_a_relative_python_path_stays_what_it_was(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "modules")
    monkeypatch.chdir(place.parent)
    assert child_environment(place)["PYTHONPATH"] == str(place.parent / "modules")


def test_when_one_ends_all_start_again(place):
    notes = []
    programs = [
        Program("long", "sleeper", (str(place / "long"), "600")),
        Program("short", "sleeper", (str(place / "short"), "0.3")),
    ]
    stop, thread = kept(place, programs, notes.append)
    until(lambda: len(pids(place / "long")) >= 2 and len(pids(place / "short")) >= 2)
    stop.set()
    thread.join()
    assert notes[0].startswith("short ended (exit code 0")
    assert not any(born(pid) for name in ("long", "short") for pid in pids(place / name))
    assert not (place / "processes.json").exists()


def test_a_program_that_is_killed_is_named_with_its_signal(place):
    notes = []
    stop, thread = kept(place, [Program("one", "sleeper", (str(place / "one"), "600"))], notes.append)
    until(lambda: pids(place / "one"))
    os.kill(pids(place / "one")[0], signal.SIGKILL)
    until(lambda: len(pids(place / "one")) == 2)
    stop.set()
    thread.join()
    assert notes[0].startswith("one ended (signal 9")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_children_die_with_a_keeper_that_is_killed(place):
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(place)], env=os.environ)
    until(lambda: pids(place / "pids"))
    keeper.kill()
    keeper.wait()
    until(lambda: not any(born(pid) for pid in pids(place / "pids")), seconds=5)


def test_what_a_predecessor_left_is_ended_and_nothing_else(place):
    left, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2))
    record = {"one": {"pid": left.pid, "born": born(left.pid)}, "two": {"pid": other.pid, "born": "1"}}
    (place / "processes.json").write_text(json.dumps(record))
    try:
        with sole_keeper(place, "federation server"):
            assert left.wait(timeout=5) == -signal.SIGTERM
            assert other.poll() is None
        assert not (place / "processes.json").exists()
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"pid": "x", "born": ""}}'])
def test_a_damaged_record_stands_in_nobodys_way(place, content):
    (place / "processes.json").write_text(content)
    with sole_keeper(place, "federation server"):
        pass


def test_two_keepers_of_one_folder_are_one_too_many(place):
    with (
        sole_keeper(place, "federation server"),
        pytest.raises(ConfigError, match="another `federation server`"),
        sole_keeper(place, "federation server"),
    ):
        pass
    with sole_keeper(place, "federation server"):
        pass


def test_a_secret_is_no_argument(place):
    with (place / "log").open("wb") as log:
        process = start_tethered(
            [sys.executable, "-c", "import sys; print(sys.argv, sys.stdin.read())"],
            environment=os.environ,
            directory=place,
            log=log.fileno(),
            secret=b"token",
        )
        assert process.wait() == 0
    assert (place / "log").read_text() == "['-c'] token\n"
    assert "token" not in str(process.args)


def test_a_log_that_has_grown_large_is_put_aside(place, monkeypatch):
    monkeypatch.setattr(processes, "_LARGEST_LOG", 3)
    (place / "one.log").write_text("long")
    with processes._log(place / "one.log") as descriptor:
        os.write(descriptor, b"new")
    assert (place / "one.log.1").read_text() == "long"
    assert (place / "one.log").read_text() == "new"
    assert (place / "one.log").stat().st_mode & 0o777 == 0o600
