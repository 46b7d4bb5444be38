"""What lies in an organisation's folder, and its settings.

A server's:

    federation.toml          where the server listens, and how long it waits (`ServerSettings`)
    config.toml              the run's settings: the same bytes at every client
    roster.json              who takes part, and everybody's verify key: the same bytes at every client
    tls/                     ca.crt, ca.key (to renew), server.pem, server.key
    nodes/NAME.pub           public keys of the clients' SuperNodes
    flower/                  what Flower keeps: its database, its logs, its home; made at the start
    run/                     the run directory
    status.json, log.jsonl   for whoever watches

A client's, open to its owner only:

    federation.toml          where the server is, and which records are this client's (`ClientSettings`)
    config.toml, roster.json as above
    identity.secret.json     its signing key
    node.key                 the SuperNode's key towards the SuperLink
    ca.crt                   whom it takes for the server
    ledger/                  what its records were used for
    joined.json              the run that it takes part in
    ledger_mark.json         how many entries the ledger has, so that an older copy of it is noticed
    flower/                  Flower's logs and home; made at the start
    ID.public.json, ID.pub   to hand out: for the roster, and for the server's nodes/
    status.json, log.jsonl   for its owner; they never leave
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import Field, field_validator, model_validator

from fedpt_secure import config as configuration
from fedpt_secure import files
from fedpt_secure.config import DataConfig, RunConfig, Settings, build
from fedpt_secure.crypto import Roster
from fedpt_secure.errors import ConfigError, IdentityError

_Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600, allow_inf_nan=False)]
_Port = Annotated[int, Field(ge=1, le=65535)]
_Group = TypeVar("_Group", bound=Settings)
SETTINGS = "federation.toml"
LONGEST_SOCKET_PATH = 100
"""Bytes; Linux takes 107."""


class Endpoint(Settings):
    """Where the server is.

    `insecure` gives up TLS and the authentication of nodes; it is refused for any other host than this machine.
    """

    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    port: _Port = 8000
    insecure: bool = False

    @model_validator(mode="after")
    def _insecure_stays_here(self) -> Endpoint:
        if self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"insecure is for 127.0.0.1 only: {self.host!r} is reached over a network, where anybody could read "
                "along and pose as the server"
            )
        return self

    @property
    def address(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Patience(Settings):
    """How long the server waits. Who is silent for longer drops out of the round."""

    gather_seconds: _Seconds = 120.0
    """At the start of a round, for the whole cohort to be there; then it begins with those who are."""
    give_up_seconds: _Seconds = 3600.0
    """At the start of a round, for as many as the round needs."""
    then: Literal["stop", "skip"] = "stop"
    """After that: stop the run, to be gone on with later; or abort the round, whose clients may have left for good, and
    go on with the next."""
    phase_seconds: _Seconds = 60.0
    """For the answers of a phase without training."""
    training_seconds: _Seconds = 900.0
    """For the answers of the phase that trains."""


RECORDS_AT_MOST = 99_999
"""Just what delta 1e-5 allows in mode `distributed`."""


class ServerSettings(Settings):
    """A server's `federation.toml`."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = "federation"
    records_at_most: Annotated[int, Field(ge=1)] = RECORDS_AT_MOST
    """As the clients have it."""
    server: Endpoint = Endpoint()
    patience: Patience = Patience()
    metrics_port: _Port | None = None
    """Prometheus metrics on 127.0.0.1; default: none."""


class ClientSettings(Settings):
    """A client's `federation.toml`."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = "federation"
    client_id: str
    server: Endpoint = Endpoint()
    records_at_most: Annotated[int, Field(ge=1)] = RECORDS_AT_MOST
    """Public upper bound of all clients' training records together, which delta must be below one over in mode
    `distributed`; the same at everybody, or nobody answers. This client refuses to take part if it alone has more."""
    data: DataConfig | None = None
    """This client's own records, all of `source`; default: its share of the run's `data`, for test networks whose
    clients read one source."""

    @field_validator("data")
    @classmethod
    def _all_its_own(cls, value: DataConfig | None) -> DataConfig | None:
        if value is not None and (value.client_column or value.partition):
            raise ValueError("all records of a client's own source are its own: no client_column, no partition")
        return value


@dataclass(frozen=True, slots=True)
class ServerFolder:
    """A server's files."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def flower(self) -> Path:
        return self.path / "flower"

    @property
    def nodes(self) -> Path:
        return self.path / "nodes"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    def tls(self, name: str) -> Path:
        """`ca.crt`, `server.pem` or `server.key`."""
        return self.path / "tls" / name

    def settings(self) -> ServerSettings:
        """Raises ConfigError: missing or not acceptable."""
        return _read(self.path, ServerSettings)

    def config(self) -> RunConfig:
        """The run's settings, as everybody has them."""
        return configuration.load(self.path / "config.toml")

    def roster(self) -> Roster:
        """Raises IdentityError: missing or not acceptable."""
        return _roster(self.path)


@dataclass(frozen=True, slots=True)
class ClientFolder:
    """A client's files."""

    path: Path

    @property
    def identity(self) -> Path:
        return self.path / "identity.secret.json"

    @property
    def node_key(self) -> Path:
        return self.path / "node.key"

    @property
    def certificate(self) -> Path:
        return self.path / "ca.crt"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def joined(self) -> Path:
        return self.path / "joined.json"

    @property
    def ledger_mark(self) -> Path:
        return self.path / "ledger_mark.json"

    @property
    def flower(self) -> Path:
        return self.path / "flower"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def socket(self) -> Path:
        """The worker's socket.

        Raises:
            ConfigError: its path is too long for a socket.
        """
        path = self.path.absolute() / "worker.sock"
        if len(str(path).encode()) > LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"the socket {path} has a path of {len(str(path).encode())} bytes; sockets take {LONGEST_SOCKET_PATH}",
                hint="a client folder with a shorter path, or a link to it",
            )
        return path

    def settings(self) -> ClientSettings:
        """Raises ConfigError: missing or not acceptable."""
        return _read(self.path, ClientSettings)

    def config(self) -> RunConfig:
        """The run's settings, as everybody has them."""
        return configuration.load(self.path / "config.toml")

    def roster(self) -> Roster:
        """Raises IdentityError: missing or not acceptable."""
        return _roster(self.path)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very address; names are not trusted to be."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def write_settings(folder: Path, settings: Settings) -> None:
    """Write `federation.toml`, atomically."""
    files.write_text(folder / SETTINGS, tomli_w.dumps(settings.model_dump(exclude_none=True)), mode=0o600)


def _read(folder: Path, kind: type[_Group]) -> _Group:
    path = folder / SETTINGS
    try:
        values: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", hint="`fedpt-secure federation init` makes a federation's folders"
        ) from error
    return build(kind, values, command="federation init")


def _roster(folder: Path) -> Roster:
    from fedpt_secure.crypto import CryptoError

    path = folder / "roster.json"
    try:
        return Roster.load(path)
    except CryptoError as error:
        raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror or error}") from error
