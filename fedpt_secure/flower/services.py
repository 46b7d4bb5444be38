"""`federation server`, `federation client` and `federation run`: what each keeps running, and how a run is watched."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpt_secure import files
from fedpt_secure.errors import ConfigError, FedptError, RoundError
from fedpt_secure.flower.acceptor import READY
from fedpt_secure.flower.certificates import expires
from fedpt_secure.flower.compatibility import require_installed
from fedpt_secure.flower.processes import Group, Program, child_environment, sole_keeper
from fedpt_secure.flower.runtime import Runtime
from fedpt_secure.flower.server_task import OUTCOME
from fedpt_secure.network.folder import ClientFolder, Endpoint, ServerFolder, is_loopback
from fedpt_secure.progress import Progress, Task

if TYPE_CHECKING:
    from fedpt_secure.flower.control import Control, RunState

_SECRET = "executor.secret"  # noqa: S105 - a file's name
_READY_SECONDS = 0.3
_WATCH_SECONDS = 1.0
_RESTART_SECONDS = 90.0
"""A SuperLink may be gone for so long before a run is given up on."""
_FOLLOWER_LOOKS = 20
Note = Callable[[str], None]


def serve(folder: ServerFolder, *, stop: threading.Event, note: Note) -> None:
    """Keep a server's SuperLink and acceptor running until `stop`.

    Raises:
        ConfigError: a file is missing, the port is taken, or another server runs on this folder.
    """
    require_installed()
    folder = ServerFolder(folder.path.absolute())
    server = folder.settings().server
    folder.config()
    folder.roster()
    if not server.insecure:
        for name in ("ca.crt", "server.pem", "server.key"):
            _require_file(folder.tls(name))
        note(f"certificate of the server: until {expires(folder.tls('server.pem').read_bytes()):%Y-%m-%d}")
    runtime = local_runtime(folder)
    with sole_keeper(folder.flower, "federation server"):
        _require_free(*_bound(server))

        def programs() -> list[Program]:
            (folder.flower / READY).unlink(missing_ok=True)
            secret = _new_secret(folder.flower)
            authority = () if runtime.authority is None else (str(runtime.authority),)
            return [
                Program("superlink", "fedpt_secure.flower.superlink", _superlink_arguments(folder, server, secret)),
                Program(
                    "acceptor",
                    "fedpt_secure.flower.acceptor",
                    (str(folder.path), runtime.address, str(secret), *authority),
                ),
            ]

        threading.Thread(target=_announce, args=(folder, server, stop, note), daemon=True).start()
        Group(folder.flower, programs, note).keep(stop)


def serve_client(
    folder: ClientFolder,
    *,
    ask_passphrase: Callable[[], str],
    progress: Progress,
    stop: threading.Event,
    note: Note,
) -> None:
    """Keep a client's worker, here, and its bridge and SuperNode, in processes of their own, running until `stop`.

    Raises:
        FedptError: something in the folder is not acceptable, or another client runs on it.
    """
    require_installed()
    folder = ClientFolder(folder.path.absolute())
    server = folder.settings().server
    if not server.insecure:
        for path in (folder.certificate, folder.node_key):
            _require_file(path)
    from fedpt_secure.network.service import serve_client as serve_worker

    failures: list[BaseException] = []
    ready = threading.Event()

    def programs() -> list[Program]:
        secret, port = _new_secret(folder.flower), _free_port()
        return [
            Program(
                "supernode", "fedpt_secure.flower.supernode", _supernode_arguments(folder, server, secret, port=port)
            ),
            Program("bridge", "fedpt_secure.flower.bridge", (str(folder.socket), f"127.0.0.1:{port}", str(secret))),
        ]

    def keep() -> None:
        try:
            while not ready.wait(_READY_SECONDS):
                if stop.is_set():
                    return
            note(f"connecting to {server.address}")
            Group(folder.flower, programs, note).keep(stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    with sole_keeper(folder.flower, "federation client"):
        keeper = threading.Thread(target=keep, name="processes")
        keeper.start()
        try:
            serve_worker(folder, ask_passphrase=ask_passphrase, progress=progress, stop=stop, ready=ready.set)
        finally:
            stop.set()
            keeper.join()
    if failures:
        raise failures[0]


def run(folder: ServerFolder, *, progress: Progress, stop: threading.Event) -> None:
    """Start the folder's federation, or join the run of it that goes on, and wait for its end.

    A server that is killed meanwhile and started again goes on with the run, and so does this.

    Raises:
        FedptError: it failed, with the exit code of its own error.
        RoundError: the SuperLink cannot be reached, or the run was ended by somebody.
        KeyboardInterrupt: `stop` was set first; the run goes on.
    """
    require_installed()
    from fedpt_secure.flower.control import connected, shell_bundle

    folder = ServerFolder(folder.path.absolute())
    with connected(local_runtime(folder)) as control, progress.task("federation", None) as bar:
        unfinished = control.unfinished()
        run_id = unfinished[0].run_id if unfinished else control.start(shell_bundle(folder.flower / "app"))
        progress.note(f"run {run_id} {'is going on' if unfinished else 'is started'}")
        while True:
            state = _finished(folder, control, run_id, bar, stop)
            if state.completed:
                return
            follower = None if _outcome(folder, run_id) else _follower(control, run_id, stop)
            if follower is None:
                raise failure(folder, run_id, state.details)
            run_id = follower
            progress.note(f"the server was interrupted; run {run_id} goes on")


def _finished(folder: ServerFolder, control: Control, run_id: int, bar: Task, stop: threading.Event) -> RunState:
    """Wait for a run's end, over restarts of the SuperLink."""
    reached = time.monotonic()
    while True:
        try:
            state = control.run(run_id)
            reached = time.monotonic()
            if state.finished:
                return state
        except RoundError:
            if time.monotonic() - reached > _RESTART_SECONDS:
                raise
        bar.describe(_phase(folder))
        if stop.wait(_WATCH_SECONDS):
            raise KeyboardInterrupt


def _follower(control: Control, run_id: int, stop: threading.Event) -> int | None:
    """The run that a restarted server started in place of one that it lost."""
    for _ in range(_FOLLOWER_LOOKS):
        later = [state.run_id for state in control.unfinished() if state.run_id != run_id]
        if later:
            return later[0]
        if stop.wait(_WATCH_SECONDS):
            raise KeyboardInterrupt
    return None


def failure(folder: ServerFolder, run_id: int, details: str) -> FedptError:
    """The error that a run ended with: the ServerApp's own, where it could write it down."""
    outcome = _outcome(folder, run_id)
    if outcome.get("exit_code"):
        error = FedptError(str(outcome.get("message")), hint=str(outcome.get("hint", "")))
        error.exit_code = int(outcome["exit_code"])
        return error
    return RoundError(
        f"the run failed: {details or 'its process is gone'}",
        hint=f"{folder.flower / 'acceptor.log'} says more; `federation run` again goes on where it stopped",
    )


def _outcome(folder: ServerFolder, run_id: int) -> dict[str, Any]:
    """What a ServerApp wrote down of its end; empty if it could not."""
    try:
        outcome = json.loads((folder.flower / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) and outcome.get("run_id") == str(run_id) else {}


def local_runtime(folder: ServerFolder) -> Runtime:
    """The SuperLink of this folder, from its own machine."""
    server = folder.settings().server
    host = server.host if is_loopback(server.host) else ("::1" if ":" in server.host else "127.0.0.1")
    address = Endpoint(host=host, port=server.port, insecure=server.insecure).address
    return Runtime(address, None if server.insecure else folder.tls("ca.crt").absolute())


def _bound(server: Endpoint) -> tuple[str, int]:
    if is_loopback(server.host):
        return server.host, server.port
    return ("::" if ":" in server.host else "0.0.0.0"), server.port  # noqa: S104 - clients come from other machines


def _superlink_arguments(folder: ServerFolder, server: Endpoint, secret: Path) -> tuple[str, ...]:
    host, port = _bound(server)
    arguments = [
        *("--host", host, "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
        *("--database", str(folder.flower / "superlink.db")),
    ]
    if server.insecure:
        return (*arguments, "--insecure")
    return (
        *arguments,
        "--enable-supernode-auth",
        *("--ssl-certfile", str(folder.tls("server.pem")), "--ssl-keyfile", str(folder.tls("server.key"))),
        *("--ssl-ca-certfile", str(folder.tls("ca.crt"))),
    )


def _supernode_arguments(folder: ClientFolder, server: Endpoint, secret: Path, *, port: int) -> tuple[str, ...]:
    arguments = (
        *("--superlink", server.address),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
    )
    if server.insecure:
        return (*arguments, "--insecure")
    return (
        *arguments,
        *("--root-certificates", str(folder.certificate)),
        *("--auth-supernode-private-key", str(folder.node_key)),
    )


def _new_secret(directory: Path) -> Path:
    child_environment(directory)
    path = directory / _SECRET
    files.write_bytes(path, secrets.token_bytes(32), mode=0o600)
    return path


def _announce(folder: ServerFolder, server: Endpoint, stop: threading.Event, note: Note) -> None:
    while not stop.wait(_READY_SECONDS):
        if (folder.flower / READY).exists():
            nodes = json.loads((folder.flower / READY).read_text(encoding="utf-8"))["nodes"]
            note(
                f"ready at {server.address}; {nodes} SuperNodes may connect; `fedpt-secure federation run` starts a run"
            )
            return


def _phase(folder: ServerFolder) -> str:
    """What the coordinator says it is doing, in a few words."""
    try:
        status = json.loads(folder.status.read_text(encoding="utf-8"))
        return f"{status['state']}, round {status['round_index'] + 1} of {status['rounds']} {status['phase']}".rstrip()
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} is missing", hint="`fedpt-secure federation init` says what comes from whom")


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be had: {error.strerror or error}", hint="`server.port` in federation.toml"
            ) from None


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(folder: ServerFolder, *, seconds: float) -> None:
    """Wait for a server that has just been started.

    Raises:
        RoundError: it is not ready in time.
    """
    deadline = time.monotonic() + seconds
    while not (folder.flower / READY).exists():
        if time.monotonic() > deadline:
            raise RoundError(f"the server in {folder.path} is not ready after {seconds:g} s")
        time.sleep(_READY_SECONDS)
