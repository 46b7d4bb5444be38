"""Programs that belong together and are kept running: what dies takes the others along, and all start again.

They die with the process that keeps them, `kill -9` included (`tether`). What outlives it all the same, where the
system has no such tie, is found by the next one by process id and time of birth, and ended before anything starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import ConfigError, RoundError

_STOP_SECONDS = 8.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_SETTLED_SECONDS = 120.0
"""Who has run for so long is restarted without a longer pause."""
_WATCH_SECONDS = 0.2
_LARGEST_LOG = 8 << 20
_RECORD = "processes.json"
_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}


@dataclass(frozen=True, slots=True)
class Program:
    """A module of this package to run with the running interpreter: `python -m MODULE ARGUMENTS`."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None


_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


def child_environment(directory: Path) -> dict[str, str]:
    """The environment of Flower's processes.

    `PATH` is one empty directory: Flower starts programs by their bare names, among them such as run what was sent over
    the network, and is to find none. Its home is in the folder; it reports to nobody and looks for no updates.
    """
    home, nothing = directory / "home", directory / "nothing"
    for place in (home, nothing):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if any(nothing.iterdir()):
        raise ConfigError(f"{nothing} must be empty: what lies in it could be started")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    for name in ("NO_PROXY", "no_proxy"):
        # What goes to this machine, task tokens among it, is no proxy's business.
        environment[name] = ",".join(filter(None, (environment.get(name), *_THIS_MACHINE)))
    # Who is said to speak through a proxy is believed of a proxy on this machine only, whatever a container's default.
    environment["FORWARDED_ALLOW_IPS"] = "127.0.0.1"
    if places := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(place).absolute()) for place in places.split(os.pathsep))
    return environment | _FLOWER | {"PATH": str(nothing), "FLWR_HOME": str(home)}


@contextmanager
def sole_keeper(directory: Path, command: str) -> Iterator[None]:
    """Hold a folder's lock for the length of a `with` block; what a predecessor left running is ended first.

    Raises:
        ConfigError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another `{command}` runs on {directory.parent}") from None
        _end_leftovers(directory / _RECORD)
        yield
    finally:
        os.close(descriptor)


class Group:
    """Starts programs, and starts all of them again, after a pause, when one has ended.

    Args:
        directory: for their logs and the record of who runs; open to the owner only.
        programs: made anew for each start (free ports change).
        note: told, in one line, of ends and restarts.
    """

    def __init__(self, directory: Path, programs: Callable[[], Sequence[Program]], note: Callable[[str], None]) -> None:
        self._directory, self._programs, self._note = directory, programs, note
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def keep(self, stop: threading.Event) -> None:
        """Keep them running until `stop`. The calling thread must live as long as they: when it ends, they do."""
        pause = _SHORTEST_PAUSE_SECONDS
        try:
            while not stop.is_set():
                started = time.monotonic()
                try:
                    for program in self._programs():
                        self._start(program)
                    self._record()
                    ended = self._first_to_end(stop)
                except OSError as error:  # a full disk, or too many processes: it may pass
                    ended = f"not started: {error.strerror or error}"
                self._end()
                if ended is None:
                    return
                if time.monotonic() - started > _SETTLED_SECONDS:
                    pause = _SHORTEST_PAUSE_SECONDS
                self._note(f"{ended}; again in {pause:g} s")
                stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        finally:
            self._end()

    def _start(self, program: Program) -> None:
        with _log(self._directory / f"{program.name}.log") as log:
            self._running[program.name] = start_tethered(
                [sys.executable, "-P", "-m", program.module, *program.arguments],
                environment=program.environment or child_environment(self._directory),
                directory=self._directory,
                log=log,
            )

    def _first_to_end(self, stop: threading.Event) -> str | None:
        while not stop.wait(_WATCH_SECONDS):
            for name, process in self._running.items():
                if (code := process.poll()) is not None:
                    return f"{name} ended ({_shown(code)}; {self._directory / name}.log)"
        return None

    def _end(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._running.values():
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
        (self._directory / _RECORD).unlink(missing_ok=True)

    def _record(self) -> None:
        record = {name: {"pid": process.pid, "born": born(process.pid)} for name, process in self._running.items()}
        files.write_json(self._directory / _RECORD, record, mode=0o600)


def start_tethered(
    command: Sequence[str], *, environment: Mapping[str, str], directory: Path, log: int, secret: bytes = b""
) -> subprocess.Popen[bytes]:
    """Start a program that dies with the calling thread.

    Args:
        directory: where it runs.
        log: descriptor for what it prints.
        secret: what it reads on standard input: other users see a process's arguments.
    """
    tether = Path(__file__).with_name("tether.py")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(tether), str(os.getpid()), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=dict(environment),
        cwd=directory,
        start_new_session=True,  # Ctrl-C is for whoever keeps it
    )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:
            stream.write(secret)
    return process


def born(pid: int) -> str:
    """When a process was born, in the system's own words; empty if there is none. With its id it names it for good."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


def _end_leftovers(path: Path) -> None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        left = [(int(entry["pid"]), str(entry["born"])) for entry in record.values()]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        path.unlink(missing_ok=True)
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [(pid, birth) for pid, birth in left if birth and born(pid) == birth]
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _STOP_SECONDS
        while any(born(pid) == birth for pid, birth in left) and time.monotonic() < deadline:
            time.sleep(0.1)
    if any(born(pid) == birth for pid, birth in left):
        raise RoundError(f"processes of an earlier start cannot be ended: {[pid for pid, _ in left]}")
    path.unlink(missing_ok=True)


@contextmanager
def _log(path: Path) -> Iterator[int]:
    """A log's descriptor, appended to; one that has grown large becomes `NAME.1`."""
    if path.exists() and path.stat().st_size > _LARGEST_LOG:
        os.replace(path, path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _shown(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
