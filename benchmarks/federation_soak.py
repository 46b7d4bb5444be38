"""A long federation of real processes with dropouts and random kills: does it go on, is memory flat, is nothing lost?

    python benchmarks/federation_soak.py --rounds 100 --clients 10 --over sockets --figure docs/figures/soak.png
    python benchmarks/federation_soak.py --rounds 20 --clients 8 --over flower
    unshare -rn sh -c 'ip link set lo up; python benchmarks/federation_soak.py --over flower --cut-rounds 5'

Clients fall silent in a random phase of a round with `--dropout`; the script kills (`kill -9`) a random client about
every `--client-kill-rounds` rounds and the server about every `--server-kill-rounds`, wherever they stand, and starts
them again. With `--cut-rounds`, inside a network namespace of its own, it takes the loopback interface down for
`--cut-seconds` about as often: nobody reaches anybody, until the partition heals.

It samples the resident memory of every process, and ends with checks that fail the run:

- every round is in the transcript once, in order;
- every client's ledger knows every round whose sum the client is in, once;
- no masked vector was accepted twice for two rounds, and no client sent two different ones in one attempt of a round.

The models are tiny (`--small builtin` for the built-in proxy) and every process is forked from one that has loaded
them, so figures of memory are of this program's behaviour over time, not of its size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import FedptError, RoundError, RunDirectoryError
from fedpt_secure.federation import ClientWorker, RunDirectory
from fedpt_secure.federation.announcement import Announcement
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.federation.terms import calibrate
from fedpt_secure.flower.new_folders import TestNetwork, make_test_network
from fedpt_secure.network import coordinator, service
from fedpt_secure.network.folder import Endpoint, Patience, ServerSettings, write_settings
from fedpt_secure.network.journal import Accepted, Began, RoundJournal
from fedpt_secure.network.sockets import SocketTransport
from fedpt_secure.network.status import read_status
from fedpt_secure.network.terms import network_config
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT

FORK = multiprocessing.get_context("fork")
SAMPLE_SECONDS = 1.0
PHASES = {"announce": 0, "share_keys": 1, "train_and_mask": 2, "confirm": 3, "unmask": 4}
WORDS = ["pain", "fever", "dose", "nurse", "ward", "night", "pulse", "blood", "sleep", "lunch", "visit", "scan"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; 0 if every check holds."""
    options = _parse(arguments)
    quiet_libraries()
    root = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        result = Soak(options, root).run()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.figure:
        draw(result, options.figure)
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=2))
    return 0 if not result["violations"] else 1


class Soak:
    """A test network, its processes, and who kills them.

    Args:
        options: of the command line.
        root: a directory with a short path, because sockets lie in it.
    """

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self._options, self._root = options, root
        self._rng = random.Random(options.seed)
        self._names = [f"clinic {index}" for index in range(options.clients)]
        config = build(RunConfig, self._settings())
        made: TestNetwork = make_test_network(
            root / "n", config, self._names, Endpoint(port=_free_port(), insecure=options.over == "sockets")
        )
        self._server, self._clients = made.server, made.clients
        patience = Patience(gather_seconds=15, give_up_seconds=600, phase_seconds=30, training_seconds=60)
        where = self._server.settings().server
        write_settings(self._server.path, ServerSettings(server=where, patience=patience))
        settled = network_config(config, clients=len(self._names))
        federation = settled.federation
        schedule = cohort_schedule(
            self._names, rounds=federation.rounds, cohort=federation.agreed_cohort, seed=config.seed
        )
        calibrate(settled, schedule)
        self._models = load_training_models(settled, cache=Cache(root / "cache"), progress=SILENT)
        self._processes: dict[str, Any] = {}
        self._samples: list[dict[str, Any]] = []
        self._kills = {"client": 0, "server": 0, "network": 0}
        if options.cut_rounds:
            _require_own_namespace()

    def run(self) -> dict[str, Any]:
        """To the last round, then the checks."""
        began, options = time.monotonic(), self._options
        console = Console(stderr=True)
        try:
            self._start_server()
            for name in self._names:
                self._start_client(name)
            if options.over == "flower":
                self._start("run", self._submit)
            next_client = self._next(options.client_kill_rounds, 0)
            next_server = self._next(options.server_kill_rounds, 0)
            next_cut = self._next(options.cut_rounds, 0)
            with shown_on(console) as progress, progress.task("rounds", options.rounds, unit="rounds") as bar:
                shown = 0
                while not self._over():
                    time.sleep(SAMPLE_SECONDS)
                    done = self._rounds_done()
                    bar.advance(max(0, done - shown))
                    shown = max(done, shown)
                    if not self._over():
                        self._sample(done, time.monotonic() - began)
                    if done >= next_client:
                        self._kill(self._rng.choice(self._names), "client")
                        next_client = self._next(options.client_kill_rounds, done)
                    if done >= next_cut:
                        _cut(options.cut_seconds)
                        self._kills["network"] += 1
                        next_cut = self._next(options.cut_rounds, done)
                    if done >= next_server:
                        self._kill("server", "server")
                        next_server = self._next(options.server_kill_rounds, done)
                    self._revive()
                    if time.monotonic() - began > options.limit_minutes * 60:
                        raise RoundError(f"not over after {options.limit_minutes:g} minutes, at round {done}")
            return self._result(time.monotonic() - began)
        finally:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                process.join(20)
                if process.is_alive():
                    process.kill()

    # Processes.

    def _start(self, name: str, work: Any, *arguments: Any) -> None:
        process = FORK.Process(target=work, args=arguments)
        process.start()
        self._processes[name] = process

    def _start_client(self, name: str) -> None:
        self._start(name, self._work, name)

    def _start_server(self) -> None:
        if self._options.over == "sockets":
            self._start("server", self._coordinate)
        else:
            self._start("server", self._superlink)

    def _coordinate(self) -> None:
        _note_masked(self._root / "masked")
        coordinator.load_training_models = lambda config, **rest: self._models
        transport = SocketTransport(tuple(folder.socket for folder in self._clients.values()))
        _or_exit(lambda: coordinator.run_federation(self._server, transport, progress=SILENT))

    def _superlink(self) -> None:
        from fedpt_secure.flower.services import serve

        _to_end(lambda stop: serve(self._server, stop=stop, note=lambda text: None))

    def _submit(self) -> None:
        from fedpt_secure.flower.services import run, wait_until_ready

        def watch() -> None:
            wait_until_ready(self._server, seconds=120)
            run(self._server, progress=SILENT, stop=threading.Event())

        _or_exit(watch)

    def _work(self, name: str) -> None:
        service.load_training_models = lambda config, **rest: self._models
        _fall_silent(name, self._options.dropout, self._options.seed)
        folder = self._clients[name]
        if self._options.over == "sockets":
            _to_end(lambda stop: service.serve_client(folder, ask_passphrase=str, progress=SILENT, stop=stop))
        else:
            from fedpt_secure.flower.services import serve_client

            _to_end(
                lambda stop: serve_client(
                    folder, ask_passphrase=str, progress=SILENT, stop=stop, note=lambda text: None
                )
            )

    def _kill(self, name: str, kind: str) -> None:
        process = self._processes[name]
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            self._kills[kind] += 1

    def _revive(self) -> None:
        for name in self._names:
            if not self._processes[name].is_alive():
                self._start_client(name)
        if not self._processes["server"].is_alive() and not self._over():
            self._start_server()
        run = self._processes.get("run")
        if run is not None and not run.is_alive() and not self._over():
            self._start("run", self._submit)

    def _next(self, every: float, done: int) -> float:
        return done + max(1, round(self._rng.expovariate(1 / every))) if every else float("inf")

    def _over(self) -> bool:
        return self._status() == "done"

    def _status(self) -> str:
        try:
            return read_status(self._server.status).state
        except RunDirectoryError:
            return "starting"

    def _rounds_done(self) -> int:
        path = self._server.run / "transcript.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _sample(self, done: int, seconds: float) -> None:
        memory = {name: _resident(process.pid) for name, process in self._processes.items() if process.is_alive()}
        self._samples.append({"seconds": round(seconds, 1), "round": done, "megabytes": memory})

    # What it ends with.

    def _result(self, seconds: float) -> dict[str, Any]:
        directory = RunDirectory.open(self._server.run)
        transcripts, checkpoint = directory.read_log("transcript"), directory.load_checkpoint()
        if checkpoint is None:
            raise RunDirectoryError("the run has no checkpoint")
        violations = []
        if [line["round"] for line in transcripts] != list(range(self._options.rounds)):
            violations.append("rounds are missing, doubled or out of order")
        counted = 0
        for name, folder in self._clients.items():
            released = [release.round_index for release in Ledger(folder.ledger).releases(checkpoint.run_id.hex())]
            counted += len(released)
            if len(set(released)) < len(released):
                violations.append(f"{name}: a round is counted twice")
            if missing := {line["round"] for line in transcripts if name in line["survivors"]} - set(released):
                violations.append(f"{name}: rounds {sorted(missing)} are summed and not counted")
        violations += _masked_twice(self._root / "masked")
        asked = sum(len(line["cohort"]) for line in transcripts)
        dropped = sum(len(line["dropped"]) for line in transcripts)
        rounds_seconds = [sum(line["seconds"].values()) for line in transcripts]
        return {
            "over": self._options.over,
            "rounds": len(transcripts),
            "clients": len(self._names),
            "cohort": len(transcripts[0]["cohort"]),
            "completed": sum(not line["aborted"] for line in transcripts),
            "aborted": {line["round"]: line["aborted"] for line in transcripts if line["aborted"]},
            "asked": asked,
            "dropped": dropped,
            "counted_releases": counted,
            "summed_updates": sum(len(line["survivors"]) for line in transcripts),
            "kills": self._kills,
            "minutes": round(seconds / 60, 2),
            "seconds_a_round_median": round(sorted(rounds_seconds)[len(rounds_seconds) // 2], 2),
            "seconds_a_round_most": round(max(rounds_seconds), 2),
            "memory": _memory(self._samples, self._names),
            "journal_left": (self._server.run / "journal").exists(),
            "violations": violations,
            "samples": self._samples,
        }

    def _settings(self) -> dict[str, Any]:
        options = self._options
        records = self._root / "records.jsonl"
        with records.open("w", encoding="utf-8") as stream:
            for name in self._names:
                for record in range(12):
                    text = " ".join(self._rng.choices(WORDS, k=8)) + f" {record}"
                    stream.write(json.dumps({"who": name, "said": text}) + "\n")
        small = options.small if options.small == "builtin" else str(_tiny_model(self._root / "small"))
        return {
            "data": {"source": str(records), "client_column": "who", "text_column": "said"},
            "models": {"small": small, "device": "cpu", "context_length": 16},
            "lora": {"rank": 2},
            "federation": {"rounds": options.rounds, "cohort": min(8, options.clients)},
        }


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory over rounds: the server's and the clients' resident megabytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name in [f"clinic {index}" for index in range(result["clients"])]:
        points = [(line["round"], line["megabytes"][name]) for line in result["samples"] if name in line["megabytes"]]
        axes.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.35, linewidth=1)
    points = [
        (line["round"], line["megabytes"]["server"]) for line in result["samples"] if "server" in line["megabytes"]
    ]
    axes.plot(*zip(*points, strict=True), color="tab:red", linewidth=1.5, label="server")
    axes.plot([], [], color="tab:blue", label="clients")
    axes.set(xlabel="rounds done", ylabel="resident memory, MB", ylim=(0, None))
    kills = result["kills"]
    axes.set_title(
        f"{result['rounds']} rounds over {result['over']}, {kills['client']} client and {kills['server']} server kills"
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _memory(samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean resident megabytes in the second and in the last tenth of the samples, and the most."""
    tenth = max(1, len(samples) // 10)
    result = {}
    for kind, members in (("server", ["server"]), ("client", list(names))):

        def mean(part: list[dict[str, Any]], members: list[str] = members) -> float:
            values = [line["megabytes"][name] for line in part for name in members if name in line["megabytes"]]
            return round(sum(values) / len(values), 1) if values else 0.0

        every = [line["megabytes"][name] for line in samples for name in members if name in line["megabytes"]]
        result[kind] = {
            "early": mean(samples[tenth : 2 * tenth]),
            "late": mean(samples[-tenth:]),
            "most": round(max(every), 1),
        }
    return result


def _fall_silent(name: str, dropout: float, seed: int) -> None:
    """In a round with this chance: no answer to one of its phases."""
    now = {"round": -1}
    for method, place in PHASES.items():
        original = getattr(ClientWorker, method)

        def answering(
            self: ClientWorker,
            content: bytes,
            *rest: Any,
            original: Any = original,
            method: str = method,
            place: int = place,
        ) -> bytes:
            if method == "announce":
                now["round"] = Announcement.from_bytes(content).round_index
            rng = random.Random(f"{seed} {name} {now['round']}")
            if rng.random() < dropout and rng.randrange(len(PHASES)) == place:
                raise RoundError("silent, for the soak")
            answer: bytes = original(self, content, *rest)
            return answer

        setattr(ClientWorker, method, answering)


def _note_masked(path: Path) -> None:
    """Write down a digest of every masked vector that the server accepts, over all its lives."""
    import hashlib

    opened, written = RoundJournal.open, RoundJournal.write

    def opening(self: RoundJournal, round_index: int, attempt: int, announcement: bytes) -> Any:
        entries = opened(self, round_index, attempt, announcement)
        began = next(entry for entry in entries if isinstance(entry, Began))
        self.noted = (began.round_index, began.attempt)
        return entries

    def writing(self: RoundJournal, entry: Any) -> None:
        if isinstance(entry, Accepted) and entry.phase == "mask":
            digest = hashlib.sha256(entry.body).hexdigest()
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([*self.noted, entry.client_id, digest]) + "\n")
        written(self, entry)

    RoundJournal.open, RoundJournal.write = opening, writing


def _masked_twice(path: Path) -> list[str]:
    if not path.exists():
        return []  # over Flower the server's process is started by Flower, and notes nothing
    seen: dict[str, tuple[Any, ...]] = {}
    sent: dict[tuple[Any, ...], str] = {}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        round_index, attempt, client, digest = json.loads(line)
        session = (round_index, attempt, client)
        if seen.setdefault(digest, session) != session:
            found.append(f"{client}: one masked vector in two sessions, {seen[digest]} and {session}")
        if sent.setdefault(session, digest) != digest:
            found.append(f"{client}: two masked vectors in session {session}")
    return found


def _require_own_namespace() -> None:
    """Refuse to cut a network that others use."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    if len(links) != 1 or ": lo:" not in links[0]:
        raise SystemExit(
            "--cut-rounds needs a network namespace of its own: unshare -rn sh -c 'ip link set lo up; python ...'"
        )


def _cut(seconds: float) -> None:
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    time.sleep(seconds)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _resident(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1000
    except OSError:
        pass  # it has just ended
    return 0.0


def _tiny_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpt_secure.lm.base import builtin_directory

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=49152, **shape, **heads, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(builtin_directory() / "tokenizer.json", folder / "tokenizer.json")
    return folder


def _to_end(work: Any) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    _or_exit(lambda: work(stop))


def _or_exit(work: Any) -> None:
    try:
        work()
    except FedptError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--over", choices=("sockets", "flower"), default="sockets")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--client-kill-rounds", type=float, default=5.0, help="on average; 0 for no kills")
    parser.add_argument("--server-kill-rounds", type=float, default=10.0, help="on average; 0 for no kills")
    parser.add_argument("--cut-rounds", type=float, default=0.0, help="on average; 0 for no partitions")
    parser.add_argument("--cut-seconds", type=float, default=20.0)
    parser.add_argument("--small", choices=("tiny", "builtin"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-minutes", type=float, default=120.0)
    parser.add_argument("--figure", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
