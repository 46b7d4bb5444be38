"""Real processes on this machine: the sum, the ledgers and the adapter are those of the local engine."""

from __future__ import annotations

import numpy as np
import pytest

from fedpt_secure.federation import RunDirectory
from fedpt_secure.network.status import read_status
from fedpt_secure.privacy import Ledger

from .conftest import local_adapter

MODES = [
    {"privacy": {"mode": "local"}},
    {"privacy": {"mode": "distributed", "clipping": "quantile", "delta": 1e-7}},
    {"privacy": {"mode": "client", "epsilon": 8.0, "delta": 1e-2}},
]


@pytest.mark.parametrize("changes", MODES, ids=lambda changes: changes["privacy"]["mode"])
def test_the_adapter_is_the_local_engines_bit_for_bit(changes, make_network, tmp_path):
    network = make_network(changes)
    network.start_clients()
    assert network.finish(network.start_server()) == 0
    directory = RunDirectory.open(network.server.run)
    ours = directory.load_checkpoint()
    theirs = local_adapter(network, tmp_path / "local")
    assert np.abs(ours.tensors["adapter"]).max() > 0
    for name, value in theirs.tensors.items():
        assert (ours.tensors[name] == value).all(), name
    assert ours.scalars["clip_norm"] == theirs.scalars["clip_norm"]
    assert (network.server.run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "local" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    status = read_status(network.server.status)
    assert (status.state, status.round_index, status.aborted) == ("done", 3, 0)
    assert {line.rounds for line in status.clients.values()} == {2, 3}
    run_id = ours.run_id.hex()
    for name, folder in network.clients.items():
        released = [release.round_index for release in Ledger(folder.ledger).releases(run_id)]
        assert released == [line["round"] for line in directory.read_log("transcript") if name in line["survivors"]]
