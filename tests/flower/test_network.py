"""A federation over Flower, on real processes of this machine, with TLS and node authentication."""

from __future__ import annotations

import numpy as np

from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT


def local_run(config, path):
    directory = RunDirectory.create(path, config)
    run_training(config, directory, cache=Cache(path.parent / "cache"), progress=SILENT)
    return directory


def test_a_run_over_flower_is_the_local_engines_bit_for_bit(make_flower_network, tmp_path):
    network = make_flower_network(3)
    network.start_server()
    network.start_clients()
    network.run()
    directory = RunDirectory.open(network.server.run)
    ours, theirs = directory.load_checkpoint(), local_run(directory.config(), tmp_path / "local").load_checkpoint()
    assert np.abs(ours.tensors["adapter"]).max() > 0
    for name, value in theirs.tensors.items():
        assert (ours.tensors[name] == value).all(), name
    (line,) = directory.read_log("transcript")
    for name, folder in network.clients.items():
        released = [release.round_index for release in Ledger(folder.ledger).releases(ours.run_id.hex())]
        assert released == ([0] if name in line["survivors"] else [])
