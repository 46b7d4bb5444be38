"""What a server tells whoever watches: names, phases, counts, and an epsilon that is never too small."""

from __future__ import annotations

import json

import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.federation import Transcript
from fedpt_secure.network.folder import ServerFolder, ServerSettings, write_settings
from fedpt_secure.network.observer import Observer
from fedpt_secure.network.status import read_status
from fedpt_secure.privacy import GaussianSteps, epsilon_spent

IDS = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path):
    write_settings(tmp_path, ServerSettings())
    return ServerFolder(tmp_path)


def make(folder):
    return Observer(folder, IDS, build(RunConfig, {"federation": {"rounds": 4}}))


def transcript(round_index, cohort, survivors, dropped=(), aborted=""):
    return Transcript(
        round_index, cohort, survivors=survivors, dropped=dict.fromkeys(dropped, "mask: vanished"), aborted=aborted
    )


def test_a_client_is_charged_for_every_round_it_was_asked_in(folder):
    """Also where its update did not arrive: it may have left."""
    observer = make(folder)
    cost = GaussianSteps(2.0, 0.5, 3)
    observer.priced(cost, 1e-5)
    observer.phase(0, "advertise", ("a", "b"))
    first = read_status(folder.status).clients["a"].epsilon
    assert first >= epsilon_spent((cost,), delta=1e-5), "charged before anything can have left"
    observer.round_over(transcript(0, ("a", "b"), ("a",), dropped=("b",)))
    assert read_status(folder.status).clients["a"].epsilon == first
    observer.phase(1, "advertise", ("a", "b"))
    observer.phase(1, "advertise", ("a", "b"))
    observer.round_over(transcript(1, ("a", "b"), (), dropped=("a", "b"), aborted="too few"))
    lines = read_status(folder.status).clients
    exact = epsilon_spent((GaussianSteps(2.0, 0.5, 6),), delta=1e-5)
    assert exact <= lines["a"].epsilon <= exact + 0.001
    assert lines["a"].epsilon == lines["b"].epsilon
    assert lines["c"].epsilon is None
    assert [(lines[name].rounds, lines[name].dropped) for name in IDS] == [(1, 1), (0, 2), (0, 0)]


def test_without_noise_no_epsilon_is_shown(folder):
    observer = make(folder)
    observer.priced(GaussianSteps(0.0, 1.0, 1), 1e-5)
    observer.phase(0, "advertise", IDS)
    observer.round_over(transcript(0, IDS, IDS))
    assert all(line.epsilon is None for line in read_status(folder.status).clients.values())


def test_rounds_of_an_earlier_process_count(folder):
    observer = make(folder)
    observer.priced(GaussianSteps(2.0, 0.5, 3), 1e-5)
    line = {"round": 0, "cohort": ["a", "b"], "survivors": ["a"], "dropped": {"b": "mask"}, "aborted": ""}
    other = {"round": 1, "survivors": [], "dropped": {"a": "mask", "b": "mask"}, "aborted": "few"}
    observer.resumed([line, line | other])
    status = read_status(folder.status)
    assert (status.round_index, status.aborted) == (2, 1)
    assert (status.clients["a"].rounds, status.clients["a"].dropped) == (1, 1)
    assert status.clients["a"].epsilon == status.clients["b"].epsilon > 0


def test_what_happens_stands_in_status_and_log(folder):
    observer = make(folder)
    observer.gathering(0, {"a", "b"})
    observer.phase(0, "mask", ("a", "b"))
    observer.client(0, "mask", "a", "answered", size=100)
    observer.client(0, "mask", "b", "silent")
    observer.closed(0, "mask", 1.5)
    observer.failed(RuntimeError("with a record's text in it"))
    status = read_status(folder.status)
    assert (status.state, status.why) == ("failed", "RuntimeError")
    assert (status.clients["a"].outcome, status.clients["b"].outcome) == ("answered", "silent")
    assert [bool(status.clients[name].seen) for name in ("a", "b")] == [True, False]
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "phase", "client", "client", "phase_over", "failed"]
    assert lines[2]["size"] == 100
    assert "record's text" not in folder.log.read_text()
