"""A federation of real processes on this machine, without Flower: workers behind their sockets, and a server."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpt_secure import config as configuration
from fedpt_secure.config import RunConfig, build
from fedpt_secure.crypto import PublicIdentity, create_identity, roster_of
from fedpt_secure.data import Cache
from fedpt_secure.errors import FedptError
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation import run as run_module
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.federation.terms import calibrate, first_budget
from fedpt_secure.network import coordinator, service
from fedpt_secure.network.folder import (
    ClientFolder,
    ClientSettings,
    Patience,
    ServerFolder,
    ServerSettings,
    write_settings,
)
from fedpt_secure.network.sockets import SocketTransport
from fedpt_secure.network.terms import network_config
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT

NAMES = tuple(f"clinic {index}" for index in range(9))
FORK = multiprocessing.get_context("fork")


class Network:
    """Folders of a server and its clients, and their processes.

    Args:
        root: a directory with a short path, because sockets lie in it.
        config: the run's.
    """

    def __init__(self, root: Path, config: RunConfig, *, patience: Patience | None = None) -> None:
        self.root = root
        self.server = ServerFolder(root / "s")
        self.clients = {name: ClientFolder(root / f"c{index}") for index, name in enumerate(NAMES)}
        self.processes: dict[str, Any] = {}
        # Forked processes inherit what takes seconds to compute, the same in each.
        self.config = network_config(config, clients=len(NAMES))
        calibrate(self.config, self.schedule())
        self.models = load_training_models(self.config, cache=Cache(root / "cache"), progress=SILENT)
        public = []
        for name, folder in self.clients.items():
            folder.path.mkdir(parents=True, mode=0o700)
            made = create_identity(name, folder.path / "keys", ask_passphrase=None)
            made.secret_path.rename(folder.identity)
            public.append(PublicIdentity.load(made.public_path))
            write_settings(folder.path, ClientSettings(client_id=name))
            Ledger.create(folder.ledger, budget=first_budget(config))
        self.roster = roster_of(public)
        for path in (self.server.path, *(folder.path for folder in self.clients.values())):
            path.mkdir(exist_ok=True)
            self.roster.save(path / "roster.json")
            configuration.save(config, path / "config.toml")
        patience = patience or Patience(gather_seconds=5, give_up_seconds=60, phase_seconds=20, training_seconds=60)
        write_settings(self.server.path, ServerSettings(patience=patience))

    def start_clients(self, *names: str, before: Callable[[], None] = lambda: None) -> None:
        """Start workers (all, if none is named) and wait until they listen."""
        for name in names or NAMES:
            process = FORK.Process(target=_work, args=(self, name, before), daemon=True)
            process.start()
            self.processes[name] = process
        for name in names or NAMES:
            wait_for(lambda name=name: self.clients[name].socket.exists(), f"{name} to listen")

    def start_server(self, before: Callable[[], None] = lambda: None) -> Any:
        """Start a server, which runs `before` first."""
        process = FORK.Process(target=_serve, args=(self, before))
        process.start()
        self.processes["server"] = process
        return process

    def finish(self, process: Any, seconds: float = 120) -> int | None:
        """Wait for a process; its exit code."""
        process.join(seconds)
        return process.exitcode

    def kill(self, name: str) -> None:
        """`kill -9` of a client or the server."""
        process = self.processes.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)

    def schedule(self) -> tuple[tuple[str, ...], ...]:
        """Who is asked in which round."""
        federation = self.config.federation
        return cohort_schedule(NAMES, rounds=federation.rounds, cohort=federation.agreed_cohort, seed=self.config.seed)

    def transport(self) -> SocketTransport:
        return SocketTransport(tuple(folder.socket for folder in self.clients.values()))

    def close(self) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join(30)


def die() -> None:
    """`kill -9` of the process that calls it."""
    os.kill(os.getpid(), signal.SIGKILL)


def local_adapter(network: Network, path: Path, dropouts: dict[int, dict[str, str]] | None = None) -> Any:
    """The last checkpoint of the local engine on the same settings.

    Args:
        dropouts: round -> client -> the phase before which it vanishes.
    """
    directory = RunDirectory.create(path, RunDirectory.open(network.server.run).config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_module, "draw_dropouts", lambda cohort, *, round_index, **rest: (dropouts or {}).get(round_index, {})
        )
        run_module.run_training(directory.config(), directory, cache=Cache(path.parent / "cache"), progress=SILENT)
    return directory.load_checkpoint()


def _work(network: Network, name: str, before: Callable[[], None]) -> None:
    service.load_training_models = lambda config, **rest: network.models
    before()
    service.serve_client(network.clients[name], ask_passphrase=_no_passphrase, progress=SILENT, stop=threading.Event())


def _serve(network: Network, before: Callable[[], None]) -> None:
    coordinator.load_training_models = lambda config, **rest: network.models
    before()
    try:
        coordinator.run_federation(
            network.server, network.transport(), progress=SILENT, cache=Cache(network.root / "cache")
        )
    except FedptError as error:
        raise SystemExit(error.exit_code) from error


def _no_passphrase() -> str:
    raise AssertionError("no key here is sealed")


def wait_for(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def clinic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clients with 12 distinct records each."""
    rng = random.Random(7)
    words = ["pain", "fever", "dose", "nurse", "ward", "night", "pulse", "blood", "sleep", "lunch", "visit", "scan"]
    path = tmp_path_factory.mktemp("clinics") / "notes.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for name in NAMES:
            for record in range(12):
                text = " ".join(rng.choices(words, k=8)) + f" {record}"
                stream.write(json.dumps({"who": name, "said": text}) + "\n")
    return path


@pytest.fixture
def network_settings(tiny_models: dict[str, str], clinic_file: Path) -> dict[str, Any]:
    return {
        "seed": 3,
        "insecure_deterministic": True,
        "data": {"source": str(clinic_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "large": tiny_models["large"], "device": "cpu", "context_length": 12},
        "lora": {"rank": 2},
        "federation": {"rounds": 3, "cohort": 8},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
    }


@pytest.fixture
def make_network(network_settings: dict[str, Any]) -> Iterator[Callable[..., Network]]:
    made: list[Network] = []
    roots: list[Path] = []

    def make(changes: dict[str, Any] | None = None, **arguments: Any) -> Network:
        root = Path(tempfile.mkdtemp(prefix="fn"))
        roots.append(root)
        settings = configuration.overlay(network_settings, changes or {})
        network = Network(root, build(RunConfig, settings), **arguments)
        made.append(network)
        return network

    yield make
    for network in made:
        network.close()
    for root in roots:
        shutil.rmtree(root)
