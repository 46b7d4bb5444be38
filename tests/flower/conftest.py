"""A federation over Flower on this machine: TLS, node keys, one process after the other to kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpt_secure import config as configuration
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import FedptError
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.federation.terms import calibrate
from fedpt_secure.network import service
from fedpt_secure.network.folder import Endpoint, Patience, ServerFolder, ServerSettings, write_settings
from fedpt_secure.network.terms import network_config
from fedpt_secure.progress import SILENT

FORK = multiprocessing.get_context("fork")
_PATIENCE = Patience(gather_seconds=60, give_up_seconds=180, phase_seconds=45, training_seconds=90)


@pytest.fixture
def task_identity(monkeypatch):
    """Flower's messages ask the process which task it runs."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class FlowerNetwork:
    """A test network, and its processes: `server`, and one by each client's id.

    Clients and server are forked, so that what takes seconds to load is loaded once; what they start (SuperLink,
    SuperNodes, bridges, the ServerApp) is started as in earnest.

    Args:
        root: a directory with a short path, because sockets lie in it.
        config: the run's.
        names: the clients' ids.
    """

    def __init__(
        self, root: Path, config: RunConfig, names: Sequence[str], *, patience: Patience = _PATIENCE, insecure: bool
    ) -> None:
        from fedpt_secure.flower.new_folders import make_test_network

        self.root, self.names = root, tuple(names)
        made = make_test_network(root / "n", config, names, Endpoint(port=_free_port(), insecure=insecure))
        self.server: ServerFolder = made.server
        self.clients = made.clients
        write_settings(self.server.path, ServerSettings(server=self.server.settings().server, patience=patience))
        settled = network_config(config, clients=len(names))
        federation = settled.federation
        calibrate(
            settled, cohort_schedule(names, rounds=federation.rounds, cohort=federation.agreed_cohort, seed=config.seed)
        )
        self.models = load_training_models(settled, cache=Cache(root / "cache"), progress=SILENT)
        self.processes: dict[str, Any] = {}

    def start_server(self, *, seconds: float = 60) -> None:
        """Start `federation server`, wait until it is ready."""
        from fedpt_secure.flower.acceptor import READY
        from fedpt_secure.flower.services import wait_until_ready

        (self.server.flower / READY).unlink(missing_ok=True)
        self._start("server", _serve, self.server)
        wait_until_ready(self.server, seconds=seconds)

    def start_clients(self, *names: str) -> None:
        """Start `federation client` (for all, if none is named); they connect by themselves."""
        for name in names or self.names:
            self._start(name, _work, self, name)

    def run(self, *, seconds: float = 240) -> None:
        """`federation run`, to its end.

        Raises:
            FedptError: why the run failed.
            KeyboardInterrupt: the time is over.
        """
        from fedpt_secure.flower.services import run

        stop = threading.Event()
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        try:
            run(self.server, progress=SILENT, stop=stop)
        except BaseException as error:
            error.add_note(self.logs())
            raise
        finally:
            timer.cancel()

    def kill(self, name: str) -> None:
        """`kill -9` of a client's or the server's main process; what it started dies with it."""
        process = self.processes.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)

    def children(self, name: str) -> dict[str, int]:
        """Program -> process id, of what a client or the server has started."""
        folder = self.server if name == "server" else self.clients[name]
        record = json.loads((folder.flower / "processes.json").read_text())
        return {program: entry["pid"] for program, entry in record.items()}

    def stop(self, name: str) -> int | None:
        """SIGTERM; the exit code."""
        process = self.processes.pop(name)
        process.terminate()
        process.join(30)
        return process.exitcode

    def logs(self) -> str:
        """All that anybody has printed, for a failing test's output."""
        found = sorted(self.root.rglob("*.log"))
        return "\n".join(f"== {path.relative_to(self.root)}\n{path.read_text()[-3000:]}" for path in found)

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join(10)

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        process = FORK.Process(target=target, args=arguments)
        process.start()
        self.processes[name] = process


def _serve(folder: ServerFolder) -> None:
    from fedpt_secure.flower.services import serve

    _to_end(lambda stop: serve(folder, stop=stop, note=lambda text: None))


def _work(network: FlowerNetwork, name: str) -> None:
    from fedpt_secure.flower.services import serve_client

    service.load_training_models = lambda config, **rest: network.models
    _to_end(
        lambda stop: serve_client(
            network.clients[name],
            ask_passphrase=_no_passphrase,
            progress=SILENT,
            stop=stop,
            note=lambda text: None,
        )
    )


def _to_end(work: Callable[[threading.Event], None]) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        work(stop)
    except FedptError as error:
        raise SystemExit(error.exit_code) from error


def _no_passphrase() -> str:
    raise AssertionError("no key here is sealed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tiny_settings(models: dict[str, str], records: Path, owners: Sequence[str]) -> dict[str, Any]:
    """Nested settings of a run small enough for a test, over records of these owners that are written here."""
    rng = random.Random(7)
    words = ["pain", "fever", "dose", "nurse", "ward", "night", "pulse", "blood", "sleep", "lunch", "visit", "scan"]
    with records.open("w", encoding="utf-8") as stream:
        for owner in owners:
            for record in range(12):
                text = " ".join(rng.choices(words, k=8)) + f" {record}"
                stream.write(json.dumps({"who": owner, "said": text}) + "\n")
    return {
        "seed": 3,
        "insecure_deterministic": True,
        "data": {"source": str(records), "client_column": "who", "text_column": "said"},
        "models": {"small": models["small"], "large": models["large"], "device": "cpu", "context_length": 12},
        "lora": {"rank": 2},
        "federation": {"rounds": 1},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
    }


@pytest.fixture
def make_flower_network(tiny_models: dict[str, str]) -> Iterator[Callable[..., FlowerNetwork]]:
    """`make(clients, changes)`: a network of so many clients, nothing started yet."""
    pytest.importorskip("flwr")
    made: list[FlowerNetwork] = []
    roots: list[Path] = []

    def make(clients: int, changes: dict[str, Any] | None = None, *, insecure: bool = False, **rest: Any) -> Any:
        root = Path(tempfile.mkdtemp(prefix="ff"))
        roots.append(root)
        names = [f"clinic {index}" for index in range(clients)]
        settings = configuration.overlay(tiny_settings(tiny_models, root / "records.jsonl", names), changes or {})
        network = FlowerNetwork(root, build(RunConfig, settings), names, insecure=insecure, **rest)
        made.append(network)
        return network

    yield make
    for network in made:
        network.close()
    for root in roots:
        shutil.rmtree(root)


def until(holds: Callable[[], object], what: str, *, seconds: float = 60) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
