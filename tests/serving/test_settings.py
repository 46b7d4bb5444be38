"""Who may listen where."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpt_secure.config import build
from fedpt_secure.errors import ConfigError
from fedpt_secure.serving import ApiKeys, Listener, ServeSettings, require_key_if_public


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host):
    require_key_if_public(ServeSettings(name="run", host=host), ApiKeys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org", "127.1"])  # noqa: S104
def test_a_public_address_needs_a_key(host):
    settings = ServeSettings(name="run", host=host)
    with pytest.raises(ConfigError, match="no API key"):
        require_key_if_public(settings, ApiKeys())
    require_key_if_public(settings, ApiKeys(["k" * 24]))


@pytest.mark.parametrize(
    "change",
    [
        {"host": ""},
        {"host": "a b"},
        {"port": 65536},
        {"name": "../run"},
        {"max_logprobs": -1},
        {"concurrent_requests": 0},
        {"requests_per_minute": 0.0},
        {"shutdown_seconds": float("nan")},
        {"tls_key": Path("key.pem")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change)).split("_key")[0]):
        build(ServeSettings, {"name": "run"} | change, command="serve")


def test_a_port_in_use_is_one_error():
    first = Listener(ServeSettings(name="run", port=0))
    try:
        port = first.socket.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            Listener(ServeSettings(name="run", port=port))
    finally:
        first.socket.close()
    with pytest.raises(ConfigError, match="cannot listen"):
        Listener(ServeSettings(name="run", host="no-such-host.invalid", port=0))
