"""A federation over Flower, on real processes of this machine, with TLS and node authentication."""

from __future__ import annotations

import io
import json
import ssl
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest

from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.network.status import read_status
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT

HOSTILE = """
from pathlib import Path
Path({marker!r}).touch()
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client, server = ClientApp(), ServerApp()
"""


def hostile_bundle(directory, marker):
    """A bundle that leaves `marker` wherever its code is imported."""
    from fedpt_secure.flower import control

    control.shell_bundle(directory)  # its pyproject.toml
    (directory / "fedpt_federation" / "__init__.py").write_text(HOSTILE.format(marker=str(marker)))
    from flwr.cli.build import build_fab_from_disk

    with pytest.warns(DeprecationWarning, match="gitwildmatch"):
        return build_fab_from_disk(directory)


def require_local_engines_result(network, directory):
    """The run's last checkpoint, which is the local engine's bit for bit."""
    run = RunDirectory.open(network.server.run)
    ours = run.load_checkpoint()
    local = RunDirectory.create(directory / "local", run.config())
    run_training(run.config(), local, cache=Cache(directory / "cache"), progress=SILENT)
    assert np.abs(ours.tensors["adapter"]).max() > 0
    for name, value in local.load_checkpoint().tensors.items():
        assert (ours.tensors[name] == value).all(), name
    return ours


def children_of(pid):
    """Process ids of a process's children."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def environment_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)


def require_locked_up(network):
    """What Flower runs can start nothing, and has started nothing."""
    for name, program in (("server", "superlink"), *((client, "supernode") for client in network.names)):
        pid = network.children(name)[program]
        environment = environment_of(pid)
        assert list(Path(environment["PATH"]).iterdir()) == []
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert children_of(pid) == []


def require_closed_to_strangers(network):
    """Only this machine controls the SuperLink, and only who has the secret takes its tasks."""
    address = f"https://{network.server.settings().server.address}"
    trust = ssl.create_default_context(cafile=network.server.tls("ca.crt"))
    with httpx.Client(verify=trust) as client:
        # The SuperLink believes a proxy on this machine whom it speaks for, so a stranger can be played.
        stranger = {"x-forwarded-for": "203.0.113.7"}
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
            assert client.post(f"{address}{path}", headers=stranger).status_code == 403
            assert client.post(f"{address}{path}").status_code != 403
        assert client.post(f"{address}/v1/fleet/pull-messages", headers=stranger).status_code not in (200, 403)


def require_secret_for_tasks(network):
    """A process of this machine without the executors' secret takes no task: else it could act as the server."""
    from fedpt_secure.flower.runtime import acquire
    from fedpt_secure.flower.services import local_runtime

    runtime = local_runtime(network.server)
    own = (network.server.flower / "executor.secret").read_bytes()
    with runtime.executor(own, "flwr-serverapp") as executor:
        assert acquire(executor, ["flwr-serverapp"]) is None
    with runtime.executor(b"a guess", "flwr-serverapp") as executor, pytest.raises(httpx.HTTPStatusError) as refused:
        acquire(executor, ["flwr-serverapp"])
    assert refused.value.response.status_code in (401, 403)


def require_strange_nodes_refused(network, directory):
    """A SuperNode whose key the server does not have, and one that takes another authority's word, do not connect."""
    from fedpt_secure.flower.certificates import make_authority, make_node_key
    from fedpt_secure.flower.processes import child_environment
    from fedpt_secure.flower.services import _free_port, _supernode_arguments

    directory.mkdir()
    (directory / "node.key").write_bytes(make_node_key()[0])
    (directory / "ca.crt").write_bytes(make_authority("another")[1])
    (directory / "secret").write_bytes(bytes(32))
    folder = network.clients[network.names[0]]
    usual = _supernode_arguments(folder, folder.settings().server, directory / "secret", port=_free_port())
    for mine, name in ((folder.node_key, "node.key"), (folder.certificate, "ca.crt")):
        arguments = [str(directory / name) if argument == str(mine) else argument for argument in usual]
        assert arguments != list(usual)
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "fedpt_secure.flower.supernode", *arguments, "--max-retries", "0"],
            env=child_environment(directory),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode != 0
        assert "SuperNode ID" not in ended.stdout + ended.stderr


def require_nothing_written_of_records_and_keys(network):
    """Whatever anybody's processes have written, Flower's database and logs among it, holds no record and no key."""
    records = [json.loads(line)["said"] for line in (network.root / "records.jsonl").read_text().splitlines()]
    seeds = [json.loads(folder.identity.read_text())["seed"] for folder in network.clients.values()]
    needles = [text.encode() for text in records] + [
        form for seed in seeds for form in (seed.encode(), bytes.fromhex(seed))
    ]
    own = {folder.identity for folder in network.clients.values()}
    written = [path for path in network.server.path.parent.rglob("*") if path.is_file() and path not in own]
    assert any(path.name == "superlink.db" for path in written)
    for path in written:
        content = path.read_bytes()
        assert not [needle for needle in needles if needle in content], path


def test_a_run_over_flower_is_the_local_engines_bit_for_bit_and_runs_no_code_that_was_sent(
    make_flower_network, tmp_path, monkeypatch
):
    """One network for all that is to be seen on it: starting one takes half a minute of work."""
    from fedpt_secure.flower import control

    marker, bundle = tmp_path / "was here", tmp_path / "bundle"
    content = hostile_bundle(bundle, marker)
    monkeypatch.setattr(control, "shell_bundle", lambda directory: content)
    network = make_flower_network(3)
    network.start_server()
    network.start_clients()
    network.run()

    ours = require_local_engines_result(network, tmp_path)
    for folder in network.clients.values():
        assert [release.round_index for release in Ledger(folder.ledger).releases(ours.run_id.hex())] == [0]
    assert read_status(network.server.status).state == "done"

    # A second run of a federation that is finished is finished.
    network.run()

    require_nothing_written_of_records_and_keys(network)
    require_locked_up(network)
    require_closed_to_strangers(network)
    require_secret_for_tasks(network)
    require_strange_nodes_refused(network, tmp_path / "stranger")

    assert not marker.exists(), "the bundle's code was run"
    assert list(network.root.rglob("fedpt_federation*")) == [], "the bundle was unpacked"
    # The bundle would have left its mark: what stock Flower does with it, does.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path / "unpacked")
    subprocess.run([sys.executable, "-c", "import fedpt_federation"], cwd=tmp_path / "unpacked", check=True)
    assert marker.exists()

    for name in ("server", *network.names):
        started = network.children(name)
        assert network.stop(name) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in started.values())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mode": "local"}, {"mode": "distributed", "clipping": "quantile", "delta": 1e-7}])
def test_eight_clients_over_flower_come_to_the_local_engines_adapter(make_flower_network, tmp_path, changes):
    network = make_flower_network(8, {"privacy": changes, "federation": {"rounds": 2, "cohort": 8}})
    network.start_server()
    network.start_clients()
    network.run(seconds=500)
    ours = require_local_engines_result(network, tmp_path)
    for folder in network.clients.values():
        assert [release.round_index for release in Ledger(folder.ledger).releases(ours.run_id.hex())] == [0, 1]


@pytest.mark.slow
def test_an_insecure_network_on_this_machine_comes_to_the_same_adapter(make_flower_network, tmp_path):
    network = make_flower_network(3, insecure=True)
    network.start_server()
    network.start_clients()
    network.run()
    require_local_engines_result(network, tmp_path)
