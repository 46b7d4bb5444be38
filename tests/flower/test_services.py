"""How Flower is started, and how a run's end becomes an exit code."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from fedpt_secure.config import RunConfig
from fedpt_secure.errors import ConfigError, FedptError, IdentityError, RoundError
from fedpt_secure.flower import services
from fedpt_secure.flower.control import RunState
from fedpt_secure.flower.new_folders import make_server, make_test_network
from fedpt_secure.network.folder import ClientFolder, Endpoint, ServerFolder
from fedpt_secure.progress import SILENT

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return make_test_network(tmp_path_factory.mktemp("n") / "x", RunConfig(), NAMES, Endpoint(port=8140))


@pytest.fixture(scope="module")
def insecure(tmp_path_factory):
    server = Endpoint(port=8141, insecure=True)
    return make_test_network(tmp_path_factory.mktemp("i") / "x", RunConfig(), NAMES, server)


def superlink(network):
    server = network.server.settings().server
    return services._superlink_arguments(network.server, server, network.server.flower / "secret")


def supernode(network):
    folder = network.clients["a"]
    return services._supernode_arguments(folder, folder.settings().server, folder.flower / "secret", port=4711)


def test_tls_and_keys_of_nodes_are_on_by_default(network):
    assert "--enable-supernode-auth" in superlink(network)
    for option in ("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"):
        assert option in superlink(network)
    assert "--root-certificates" in supernode(network)
    assert "--auth-supernode-private-key" in supernode(network)
    assert "--insecure" not in (*superlink(network), *supernode(network))


def test_without_tls_flower_listens_on_this_machine_only(insecure):
    assert "--insecure" in superlink(insecure)
    assert superlink(insecure)[:2] == ("--host", "127.0.0.1")
    assert "--insecure" in supernode(insecure)
    assert services.local_runtime(insecure.server).authority is None


def test_flower_starts_no_program_and_gives_tasks_to_who_has_the_secret(network):
    for arguments in (superlink(network), supernode(network)):
        assert arguments[arguments.index("--isolation") + 1] == "process"
        assert arguments[arguments.index("--superexec-auth-secret-file") + 1].endswith("secret")
    assert "--disable-runtime-dependency-installation" in superlink(network)


def test_a_nodes_own_interface_is_on_this_machine_only(network):
    arguments = supernode(network)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"


def test_executors_get_a_new_secret_at_every_start(tmp_path):
    secrets = {services._new_secret(tmp_path).read_bytes() for _ in range(3)}
    assert {len(secret) for secret in secrets} == {32}
    assert len(secrets) == 3
    assert (tmp_path / "executor.secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("host", "bound", "reached"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8000"),
        ("::1", "::1", "[::1]:8000"),
        ("fed.example.org", "0.0.0.0", "127.0.0.1:8000"),  # noqa: S104
        ("203.0.113.7", "0.0.0.0", "127.0.0.1:8000"),  # noqa: S104
        ("2001:db8::7", "::", "[::1]:8000"),
    ],
)
def test_a_server_listens_where_its_clients_look_and_is_reached_from_its_own_machine(tmp_path, host, bound, reached):
    folder = make_server(tmp_path / "s", RunConfig(), Endpoint(host=host))
    assert services._bound(folder.settings().server) == (bound, 8000)
    assert services.local_runtime(folder).address == reached


def test_a_port_that_is_taken_is_said_at_the_start(network):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 8140))
        taken.listen()
        with pytest.raises(ConfigError, match="port 8140"):
            services.serve(network.server, stop=threading.Event(), note=lambda text: None)


def test_a_missing_file_is_named(tmp_path):
    network = make_test_network(tmp_path / "x", RunConfig(), NAMES, Endpoint(port=8142))
    network.server.tls("server.key").unlink()
    with pytest.raises(ConfigError, match=r"server\.key is missing"):
        services.serve(network.server, stop=threading.Event(), note=lambda text: None)
    (network.server.path / "roster.json").unlink()
    with pytest.raises(IdentityError, match=r"roster\.json"):
        services.serve(network.server, stop=threading.Event(), note=lambda text: None)
    folder = network.clients["a"]
    folder.node_key.unlink()
    with pytest.raises(ConfigError, match=r"node\.key is missing"):
        services.serve_client(
            ClientFolder(folder.path),
            ask_passphrase=str,
            progress=SILENT,
            stop=threading.Event(),
            note=lambda text: None,
        )


def write_outcome(folder, **changes):
    folder.flower.mkdir(exist_ok=True)
    outcome = {"run_id": "7", "exit_code": 6, "message": "over budget", "hint": "ask"} | changes
    (folder.flower / "outcome.json").write_text(json.dumps(outcome))


def test_a_failed_runs_own_error_is_the_commands(tmp_path):
    folder = ServerFolder(tmp_path)
    write_outcome(folder)
    error = services.failure(folder, 7, "details")
    assert (error.exit_code, error.message, error.hint) == (6, "over budget", "ask")


@pytest.mark.parametrize("changes", [{"run_id": "8"}, {"exit_code": 0}])
def test_the_outcome_of_another_run_is_not_this_ones(tmp_path, changes):
    folder = ServerFolder(tmp_path)
    write_outcome(folder, **changes)
    error = services.failure(folder, 7, "stopped")
    assert isinstance(error, RoundError)
    assert "stopped" in error.message


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_outcome_is_none(tmp_path, content):
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "outcome.json").write_text(content)
    assert isinstance(services.failure(ServerFolder(tmp_path), 7, ""), RoundError)


class Control:
    """A SuperLink's runs: `script` is what each look at a run finds, an exception or a state."""

    def __init__(self, *script, later=()):
        self.script, self.later = list(script), list(later)

    def run(self, run_id):
        found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(found, Exception):
            raise found
        return found

    def unfinished(self):
        return self.later.pop(0) if self.later else []


RUNNING = RunState(7, False, False, False, "")
DONE = RunState(7, False, True, True, "")
AWAY = RoundError("the SuperLink cannot be reached")


class Bar:
    def describe(self, text):
        pass


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(services, "_WATCH_SECONDS", 0.01)


def test_a_superlink_that_is_away_for_a_while_ends_no_watching(tmp_path):
    control = Control(RUNNING, AWAY, AWAY, RUNNING, DONE)
    assert services._finished(ServerFolder(tmp_path), control, 7, Bar(), threading.Event()) is DONE


def test_a_superlink_that_stays_away_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "_RESTART_SECONDS", 0.05)
    with pytest.raises(FedptError, match="cannot be reached"):
        services._finished(ServerFolder(tmp_path), Control(RUNNING, AWAY), 7, Bar(), threading.Event())


def test_ctrl_c_ends_the_watching(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        services._finished(ServerFolder(tmp_path), Control(RUNNING), 7, Bar(), stop)


def test_the_run_that_a_restarted_server_goes_on_with_is_followed():
    later = [[], [RUNNING], [RUNNING, RunState(8, True, False, False, "")]]
    assert services._follower(Control(RUNNING, later=later), 7, threading.Event()) == 8
    assert services._follower(Control(RUNNING), 7, threading.Event()) is None
