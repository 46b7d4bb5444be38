"""`kill -9` of the server and of clients, in every phase, on real processes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from fedpt_secure.federation import ClientWorker, RunDirectory
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.network.journal import Accepted, Closed, RoundJournal
from fedpt_secure.network.status import read_status
from fedpt_secure.privacy import Ledger

from .conftest import die, local_adapter, wait_for

PHASES = ("advertise", "share_keys", "mask", "confirm", "unmask")
COHORT = 8

# (class, method, which call in this process it dies inside, before or after the call)
SERVER_MOMENTS = [
    (RunDirectory, "count_start", 1, "before"),
    *[
        moment
        for phase in PHASES
        for moment in (
            (RoundJournal, "write", f"{phase} 4", "before"),
            (RoundJournal, "write", f"{phase} 2", "after"),
            (RoundJournal, "write", f"{phase} over", "after"),
        )
    ],
    (AggregationServer, "aggregate", 1, "before"),
    (AggregationServer, "aggregate", 1, "after"),
    (RunDirectory, "append", 1, "after"),
    (RunDirectory, "append", 2, "after"),
    (RunDirectory, "save_checkpoint", 1, "before"),
    (RunDirectory, "save_checkpoint", 1, "after"),
    (RoundJournal, "remove", 1, "before"),
    (RunDirectory, "replace_adapter", 1, "before"),
]


def _die_inside(owner, name, call, when):
    """Die in the n-th call, or in that for the n-th message of a phase or its end."""
    original, calls = getattr(owner, name), Counter()

    def dying(*args, **kwargs):
        number = calls["all"] = calls["all"] + 1
        if name == "write":
            entry = args[1]
            calls[entry.phase] += 1
            number = f"{entry.phase} {'over' if isinstance(entry, Closed) else calls[entry.phase]}"
        if number == call and when == "before":
            die()
        result = original(*args, **kwargs)
        if number == call:
            die()
        return result

    setattr(owner, name, dying)


def _noting(path: Path):
    """The server notes which masked vectors it accepted, over all its lives."""
    original = RoundJournal.open

    def opening(self, round_index, attempt, announcement):
        write = self.write

        def noting(entry):
            if isinstance(entry, Accepted) and entry.phase == "mask":
                line = f"{round_index} {attempt} {entry.client_id.replace(' ', '_')} {_hash(entry.body)}\n"
                with path.open("a") as stream:
                    stream.write(line)
            write(entry)

        entries = original(self, round_index, attempt, announcement)
        self.write = noting
        return entries

    RoundJournal.open = opening


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_server_killed_at_any_moment_goes_on_to_the_very_same_adapter(mode, make_network, tmp_path):
    """A moment a life, all but the last in the first round: nothing acknowledged is lost or done twice."""
    privacy = {"mode": mode} | ({"delta": 1e-7} if mode == "distributed" else {})
    network = make_network({"federation": {"rounds": 2}, "privacy": privacy})
    network.start_clients()
    seen = tmp_path / "masked"

    def doomed(moment):
        _noting(seen)
        _die_inside(*moment)

    for moment in SERVER_MOMENTS:
        code = network.finish(network.start_server(lambda moment=moment: doomed(moment)))
        assert code == -9, f"not killed at {moment[1]} {moment[2:]}"
    assert network.finish(network.start_server()) == 0
    directory = RunDirectory.open(network.server.run)
    transcripts = directory.read_log("transcript")
    assert [line["round"] for line in transcripts] == [0, 1]
    assert [(line["aborted"], len(line["survivors"])) for line in transcripts] == [("", COHORT)] * 2
    assert not (network.server.run / "journal").exists()
    ours, theirs = directory.load_checkpoint(), local_adapter(network, tmp_path / "local")
    assert (ours.tensors["adapter"] == theirs.tensors["adapter"]).all()
    # Each client released once a round, and what it masked is one vector a round, whatever the server's lives.
    masked: dict[tuple[str, str], set[str]] = {}
    for line in seen.read_text().splitlines():
        round_index, _, client, digest = line.split()
        masked.setdefault((round_index, client), set()).add(digest)
    assert all(len(digests) == 1 for digests in masked.values())
    assert len(set.union(*masked.values())) == len(masked), "two rounds or clients sent the same masked vector"
    for name, folder in network.clients.items():
        rounds = [release.round_index for release in Ledger(folder.ledger).releases(ours.run_id.hex())]
        assert rounds == [line["round"] for line in transcripts if name in line["survivors"]]


CLIENT_MOMENTS = [
    ("announce", "before"),
    ("announce", "after"),
    ("share_keys", "before"),
    ("share_keys", "after"),
    ("train_and_mask", "before"),
    ("train_and_mask", "after"),
    ("confirm", "before"),
    ("confirm", "after"),
    ("unmask", "before"),
    ("unmask", "after"),
]
"""A client dies so in the round of that number: before it has worked, or after it and before its answer leaves."""
OF_METHOD = dict(zip(("announce", "share_keys", "train_and_mask", "confirm", "unmask"), PHASES, strict=True))


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_clients_killed_in_every_phase_drop_out_and_come_back(mode, make_network, tmp_path):
    """The sum is over the others, bit for bit that of the local engine with these dropouts; no ledger counts less."""
    privacy = {"mode": mode} | ({"delta": 1e-7} if mode == "distributed" else {})
    network = make_network({"federation": {"rounds": len(CLIENT_MOMENTS) + 1}, "privacy": privacy})
    schedule = network.schedule()
    victims = {round_index: schedule[round_index][round_index % COHORT] for round_index in range(len(CLIENT_MOMENTS))}

    def doomed(name):
        """Dies in the rounds that it is the victim of, once each: a marker file says that it has."""
        for method in OF_METHOD:
            original = getattr(ClientWorker, method)

            def dying(self, content, *rest, original=original, method=method):
                if method == "announce":
                    from fedpt_secure.federation.announcement import Announcement

                    self.now = Announcement.from_bytes(content).round_index
                now = getattr(self, "now", None)
                mine = victims.get(now) == name and CLIENT_MOMENTS[now][0] == method
                if mine and CLIENT_MOMENTS[now][1] == "before":
                    die()
                answer = original(self, content, *rest)
                if mine:
                    die()
                return answer

            setattr(ClientWorker, method, dying)

    for name in network.clients:
        network.start_clients(name, before=lambda name=name: doomed(name))
    server = network.start_server()
    killed = []

    def over():
        for name in network.clients:
            if not network.processes[name].is_alive():
                killed.append(name)
                network.processes[name].join()
                network.start_clients(name, before=lambda name=name: doomed(name))
        return not server.is_alive()

    wait_for(over, "the run to end", seconds=240)
    assert network.finish(server) == 0
    assert sorted(killed) == sorted(victims.values()), "each victim dies once"
    directory = RunDirectory.open(network.server.run)
    transcripts = directory.read_log("transcript")
    assert [line["aborted"] for line in transcripts] == [""] * len(transcripts)
    dropouts = {index: {victims[index]: OF_METHOD[method]} for index, (method, _) in enumerate(CLIENT_MOMENTS)}
    for index, line in enumerate(transcripts):
        phases = {client: why.split(":")[0] for client, why in line["dropped"].items()}
        assert phases == dropouts.get(index, {}), f"round {index}"
    ours, theirs = directory.load_checkpoint(), local_adapter(network, tmp_path / "local", dropouts)
    assert (ours.tensors["adapter"] == theirs.tensors["adapter"]).all()
    for name, folder in network.clients.items():
        counted = {release.round_index for release in Ledger(folder.ledger).releases(ours.run_id.hex())}
        summed = {line["round"] for line in transcripts if name in line["survivors"]}
        # Where it died between counting and sending, it has counted one more than was summed.
        more = {
            index
            for index, victim in victims.items()
            if victim == name and CLIENT_MOMENTS[index] == ("train_and_mask", "after")
        }
        assert counted == summed | more
    status = read_status(network.server.status)
    assert sum(line.dropped for line in status.clients.values()) == len(CLIENT_MOMENTS)


def test_server_and_clients_killed_together_lose_at_most_the_round(make_network):
    """A power cut of everything in the middle of a round: the round is lost or done, the next ones complete."""
    network = make_network({"federation": {"rounds": 3}})
    network.start_clients()
    moment = (RoundJournal, "write", "mask 4", "after")
    assert network.finish(network.start_server(lambda: _die_inside(*moment))) == -9
    network.processes.pop("server")
    for name in list(network.processes):
        network.kill(name)
    network.start_clients()
    assert network.finish(network.start_server()) == 0
    directory = RunDirectory.open(network.server.run)
    transcripts = directory.read_log("transcript")
    assert [bool(line["aborted"]) for line in transcripts] == [True, False, False]
    run_id = directory.load_checkpoint().run_id.hex()
    for folder in network.clients.values():
        rounds = [release.round_index for release in Ledger(folder.ledger).releases(run_id)]
        assert len(rounds) == len(set(rounds))
    assert os.listdir(network.server.run / "adapter")
