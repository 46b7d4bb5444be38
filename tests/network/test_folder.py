"""Settings of a federation's folders, status files and logs: checked where they are read."""

from __future__ import annotations

import json
import stat

import pytest

from fedpt_secure.config import DataConfig
from fedpt_secure.errors import ConfigError, IdentityError, RunDirectoryError
from fedpt_secure.network.event_log import EventLog
from fedpt_secure.network.folder import (
    SETTINGS,
    ClientFolder,
    ClientSettings,
    Endpoint,
    ServerFolder,
    ServerSettings,
    is_loopback,
    write_settings,
)
from fedpt_secure.network.joined_run import join_run, joined_run
from fedpt_secure.network.metrics import Metrics
from fedpt_secure.network.status import ClientLine, StatusFile, new_status, read_status
from fedpt_secure.network.transport import Reply, Request


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_without_tls_only_this_machine_is_reached(host):
    assert Endpoint(host=host, insecure=True).insecure
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "localhost", "example.org", "::"])  # noqa: S104
def test_without_tls_every_other_host_is_refused_names_included(host):
    with pytest.raises(ValueError, match=r"insecure is for 127\.0\.0\.1 only"):
        Endpoint(host=host, insecure=True)
    assert Endpoint(host=host).address.endswith(":8000")


def test_settings_survive_their_file(tmp_path):
    client = ClientSettings(client_id="clinic 1", data=DataConfig(source="notes.jsonl", text_column="said"))
    write_settings(tmp_path, client)
    assert ClientFolder(tmp_path).settings() == client
    assert stat.S_IMODE((tmp_path / SETTINGS).stat().st_mode) == 0o600
    server = ServerSettings(metrics_port=9100)
    write_settings(tmp_path, server)
    assert ServerFolder(tmp_path).settings() == server


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("server = 3", "server"),
        ("colour = 'red'", "colour"),
        ("not toml", "cannot be read"),
        ("[patience]\nphase_seconds = 0", "phase_seconds"),
        ("[patience]\nphase_seconds = nan", "phase_seconds"),
        ("[server]\nport = 70000", "port"),
    ],
)
def test_bad_settings_are_named(content, match, tmp_path):
    (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(ConfigError, match=match):
        ServerFolder(tmp_path).settings()


def test_a_missing_folder_says_how_one_is_made(tmp_path):
    with pytest.raises(ConfigError) as caught:
        ServerFolder(tmp_path / "nowhere").settings()
    assert "federation init" in caught.value.hint
    with pytest.raises(IdentityError, match=r"roster\.json"):
        ServerFolder(tmp_path).roster()


def test_a_clients_own_source_has_no_other_owners():
    with pytest.raises(ValueError, match="its own"):
        ClientSettings(client_id="x", data=DataConfig(source="f.jsonl", text_column="t", client_column="who"))


def test_a_path_too_long_for_a_socket_is_named(tmp_path):
    with pytest.raises(ConfigError, match="path of"):
        _ = ClientFolder(tmp_path / ("x" * 100)).socket


def test_a_folder_belongs_to_one_run(tmp_path):
    path = tmp_path / "joined.json"
    assert joined_run(path) is None
    join_run(path, b"a" * 16)
    join_run(path, b"a" * 16)
    assert joined_run(path) == b"a" * 16
    from fedpt_secure.errors import RoundError

    with pytest.raises(RoundError, match="another run"):
        join_run(path, b"b" * 16)
    for content in ("", "{}", '{"schema": "fedpt-secure/joined/1", "run_id": "ff"}', "[]"):
        path.write_text(content)
        with pytest.raises(RunDirectoryError, match="damaged"):
            joined_run(path)


def test_a_status_survives_its_file_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "status.json"
    file = StatusFile(path, new_status("server", {"clinic": ClientLine(reachable=True)}))
    file.status.state = "round"
    file.write(now=True)
    assert read_status(path) == file.status
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for content in ("", "[]", '{"role": "server"}', '{"role": "client", "pid": 1, "rounds": -1}'):
        path.write_text(content)
        with pytest.raises(RunDirectoryError, match="not a status"):
            read_status(path)
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        read_status(tmp_path / "nothing")


def test_a_log_line_has_known_fields_only_and_missed_lines_are_counted(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "log.jsonl")
    log.write("phase", round=1, phase="mask")
    with pytest.raises(ValueError, match="no field 'text'"):
        log.write("phase", text="a record")
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "_append", _full)
        log.write("phase", round=2)
    log.write("phase", round=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 3]
    assert lines[1]["lines_missed"] == 1
    assert stat.S_IMODE((tmp_path / "log.jsonl").stat().st_mode) == 0o600


def _full(self, line):
    raise OSError(28, "No space left on device")


def test_metrics_are_counts_without_names(unused_port):
    import urllib.request

    metrics = Metrics.on(unused_port)
    metrics.client("mask", "answered", 100)
    metrics.phase("mask", 0.5)
    metrics.round(aborted=False, survivors=7)
    metrics.reachable(8)
    with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'fedpt_secure_federation_received_bytes_total{phase="mask"} 100.0' in text
    assert 'fedpt_secure_federation_rounds_total{outcome="completed"} 1.0' in text
    assert "fedpt_secure_federation_survivors 7.0" in text
    with pytest.raises(ConfigError, match="cannot be used"):
        Metrics.on(unused_port)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("kind", [Request, Reply])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x93\x01\x02\x03",
        b"\xff" * 100,
        b"\x93\xa6answer\xc4\x00\xa1\xff",
        b"\x92\xa1\xff\xc4\x00",
        b"\x91" * 100_000,
    ],
)
def test_bytes_that_are_no_message_are_refused(kind, content):
    from fedpt_secure.errors import RoundError

    with pytest.raises(RoundError):
        kind.from_bytes(content)


def test_an_older_copy_of_a_ledger_is_refused(tmp_path):
    from fedpt_secure.errors import LedgerError
    from fedpt_secure.network.joined_run import mark_ledger, require_not_older

    path = tmp_path / "ledger_mark.json"
    require_not_older(path, 0)
    mark_ledger(path, 7)
    require_not_older(path, 7)
    require_not_older(path, 8)
    with pytest.raises(LedgerError, match="has 6 entries and had 7"):
        require_not_older(path, 6)
    path.write_text("{}")
    with pytest.raises(LedgerError, match="damaged"):
        require_not_older(path, 8)
