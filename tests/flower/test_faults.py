"""Processes of a federation over Flower that are killed: nothing is lost, and nothing is counted twice."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from fedpt_secure.data import Cache
from fedpt_secure.errors import FedptError
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.network.folder import Patience
from fedpt_secure.network.status import read_status
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT

from .conftest import until

pytestmark = pytest.mark.slow
SECONDS = 300.0


class Watching:
    """`federation run` in a thread."""

    def __init__(self, network):
        self.failure = None
        self._thread = threading.Thread(target=self._run, args=(network,))
        self._thread.start()

    def _run(self, network):
        try:
            network.run(seconds=900)
        except (FedptError, KeyboardInterrupt) as error:
            self.failure = error

    def finish(self):
        self._thread.join()
        if self.failure is not None:
            raise self.failure


def at(network, round_index, phase):
    """Wait until the coordinator is in this phase of this round, or past it."""
    order = ("advertise", "share_keys", "mask", "confirm", "unmask")

    def there():
        try:
            status = read_status(network.server.status)
        except FedptError:
            return False
        place = (status.round_index, order.index(status.phase) if status.phase in order else -1)
        return place >= (round_index, order.index(phase)) or status.state == "done"

    try:
        until(there, f"round {round_index}, {phase}", seconds=SECONDS)
    except AssertionError as error:
        error.add_note(network.logs())
        raise


def task_of(acceptor):
    """The process id of the ServerApp."""
    from .test_network import children_of

    (task,) = children_of(acceptor)
    return task


def counted(network, run_id):
    """Client -> rounds that its ledger has counted."""
    return {
        name: [release.round_index for release in Ledger(folder.ledger).releases(run_id)]
        for name, folder in network.clients.items()
    }


def test_a_server_killed_in_every_way_comes_to_the_local_engines_adapter(make_flower_network, tmp_path):
    network = make_flower_network(3, {"federation": {"rounds": 4}})
    network.start_server()
    network.start_clients()
    watching = Watching(network)
    at(network, 0, "mask")
    os.kill(task_of(network.children("server")["acceptor"]), signal.SIGKILL)
    at(network, 1, "share_keys")
    os.kill(network.children("server")["superlink"], signal.SIGKILL)
    at(network, 2, "confirm")
    network.kill("server")
    network.start_server()
    at(network, 3, "mask")
    os.kill(network.children("server")["acceptor"], signal.SIGKILL)
    watching.finish()

    directory = RunDirectory.open(network.server.run)
    ours = directory.load_checkpoint()
    transcript = directory.read_log("transcript")
    assert [line["round"] for line in transcript] == [0, 1, 2, 3]
    assert {tuple(line["survivors"]) for line in transcript} == {network.names}
    local = RunDirectory.create(tmp_path / "local", directory.config())
    run_training(directory.config(), local, cache=Cache(tmp_path / "cache"), progress=SILENT)
    for name, value in local.load_checkpoint().tensors.items():
        assert (ours.tensors[name] == value).all(), name
    assert counted(network, ours.run_id.hex()) == {name: [0, 1, 2, 3] for name in network.names}


def test_a_client_killed_in_every_way_drops_out_and_comes_back(make_flower_network):
    patience = Patience(gather_seconds=120, give_up_seconds=300, phase_seconds=30, training_seconds=60)
    network = make_flower_network(4, {"federation": {"rounds": 4, "cohort": 4}}, patience=patience)
    network.start_server()
    network.start_clients()
    victim = network.names[1]
    watching = Watching(network)
    at(network, 0, "mask")
    network.kill(victim)
    at(network, 0, "confirm")
    network.start_clients(victim)
    at(network, 1, "mask")
    os.kill(network.children(victim)["supernode"], signal.SIGKILL)
    at(network, 2, "share_keys")
    until(lambda: (network.clients[victim].flower / "processes.json").exists(), "the client to be restarted")
    os.kill(network.children(victim)["bridge"], signal.SIGKILL)
    watching.finish()

    directory = RunDirectory.open(network.server.run)
    ours, transcript = directory.load_checkpoint(), directory.read_log("transcript")
    assert [line["round"] for line in transcript] == [0, 1, 2, 3]
    assert not any(line["aborted"] for line in transcript)
    assert victim in transcript[3]["survivors"]
    assert np.isfinite(ours.tensors["adapter"]).all()
    ledgers = counted(network, ours.run_id.hex())
    for line in transcript:
        for name in line["survivors"]:
            assert line["round"] in ledgers[name], "a release that is in a sum is not in its ledger"
    assert all(len(set(rounds)) == len(rounds) for rounds in ledgers.values())
