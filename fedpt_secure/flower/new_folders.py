"""What `federation init` writes: a whole test network on one machine, or one organisation's side of a real one.

Nothing that exists is ever replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.config import DataConfig, RunConfig
from fedpt_secure.crypto import CryptoError, PublicIdentity, Roster, StoredIdentity, roster_of
from fedpt_secure.errors import ConfigError, IdentityError
from fedpt_secure.federation.terms import first_budget
from fedpt_secure.flower.certificates import make_authority, make_node_key, make_server_certificate
from fedpt_secure.network.folder import (
    ClientFolder,
    ClientSettings,
    Endpoint,
    ServerFolder,
    ServerSettings,
    write_settings,
)
from fedpt_secure.privacy import Budget, Ledger

_LOCAL = ("localhost", "127.0.0.1", "::1")
"""The server's own machine reaches it by these."""
_LARGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class TestNetwork:
    """A federation on one machine."""

    server: ServerFolder
    clients: dict[str, ClientFolder]
    roster: Roster


@dataclass(frozen=True, slots=True)
class NewClient:
    """One organisation's side, and what of it goes to the others."""

    folder: ClientFolder
    public_identity: Path
    node_key: Path


def make_server(
    path: Path, config: RunConfig, server: Endpoint, *, name: str = "federation", roster: Roster | None = None
) -> ServerFolder:
    """Write a server's folder.

    Raises:
        ConfigError: the folder holds something already, or the host cannot stand in a certificate.
    """
    folder = ServerFolder(path)
    with _new(path, mode=0o700):
        write_settings(path, ServerSettings(name=name, server=server))
        _create(path / "config.toml", config.to_toml().encode())
        folder.nodes.mkdir(mode=0o700)
        if roster is not None:
            roster.save(path / "roster.json")
        if not server.insecure:
            folder.tls("ca.crt").parent.mkdir(mode=0o700)
            key, authority = make_authority(name)
            _create(folder.tls("ca.key"), key, mode=0o600)
            _create(folder.tls("ca.crt"), authority)
            renew(folder, server)
    return folder


def renew(folder: ServerFolder, server: Endpoint) -> None:
    """Give a server a new certificate under the authority that its clients have.

    Raises:
        ConfigError: the authority's key is not there or not its own, or the host cannot stand in a certificate.
    """
    try:
        authority_key, authority = folder.tls("ca.key").read_bytes(), folder.tls("ca.crt").read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
    hosts = list(dict.fromkeys((server.host, *_LOCAL)))
    key, certificate = make_server_certificate(hosts, authority_key=authority_key, authority=authority)
    # The key first: a server that starts between the two says that they do not fit, and starts again.
    files.write_bytes(folder.tls("server.key"), key, mode=0o600)
    files.write_bytes(folder.tls("server.pem"), certificate, mode=0o644)


def make_client(
    path: Path,
    settings: ClientSettings,
    budget: Budget,
    *,
    config: RunConfig | None = None,
    ask_passphrase: Callable[[], str] | None = None,
) -> NewClient:
    """Write a client's folder: its keys, its ledger with its owner's budget, and what it hands out.

    Raises:
        ConfigError: the folder holds something already.
        IdentityError: the id or the passphrase is not acceptable.
        LedgerError: the ledger cannot be begun.
    """
    folder = ClientFolder(path)
    try:
        identity = StoredIdentity.make(
            settings.client_id, passphrase=None if ask_passphrase is None else ask_passphrase()
        )
    except CryptoError as error:
        raise IdentityError(error.message, hint=error.hint) from error
    name = file_name(settings.client_id)
    public, node = path / f"{name}.public.json", path / f"{name}.pub"
    with _new(path, mode=0o700):
        write_settings(path, settings)
        _create(folder.identity, identity.to_json(), mode=0o600)
        _create(public, identity.public.to_json())
        private_key, public_key = make_node_key()
        _create(folder.node_key, private_key, mode=0o600)
        _create(node, public_key)
        if config is not None:
            _create(path / "config.toml", config.to_toml().encode())
        Ledger.create(folder.ledger, budget=budget)
    return NewClient(folder, public, node)


def make_test_network(
    path: Path, config: RunConfig, clients: Sequence[str], server: Endpoint, *, name: str = "federation"
) -> TestNetwork:
    """Write a server and its clients, all on this machine, with everything exchanged that they need of each other.

    Raises:
        ConfigError: the folder holds something already, or two clients' ids make the same folder name.
    """
    if len({file_name(client) for client in clients}) < len(clients):
        raise ConfigError("two clients' ids are the same but for characters that cannot stand in a file's name")
    with _new(path, mode=0o700):
        made = {
            client: make_client(
                path / "clients" / file_name(client),
                ClientSettings(name=name, client_id=client, server=server),
                first_budget(config),
                config=config,
            )
            for client in clients
        }
        roster = roster_of(PublicIdentity.load(item.public_identity) for item in made.values())
        folder = make_server(path / "server", config, server, name=name, roster=roster)
        for item in made.values():
            roster.save(item.folder.path / "roster.json")
            _create(folder.nodes / item.node_key.name, item.node_key.read_bytes())
            if not server.insecure:
                _create(item.folder.certificate, folder.tls("ca.crt").read_bytes())
    return TestNetwork(folder, {client: item.folder for client, item in made.items()}, roster)


def dealt(data: DataConfig, clients: int) -> DataConfig:
    """Settings for data without owners: dealt to so many clients."""
    if data.client_column is not None or data.partition is not None:
        return data
    return data.model_copy(update={"clients": clients, "partition": "equal"})


def file_name(client_id: str) -> str:
    """A client's id as a file's name."""
    return re.sub(r"^\.|[^A-Za-z0-9._-]", "_", client_id)[:_LARGEST_NAME]


@contextlib.contextmanager
def _new(path: Path, *, mode: int) -> Iterator[None]:
    """A directory that is new or empty."""
    if path.is_dir() and not any(path.iterdir()):
        path.chmod(mode)
    else:
        try:
            path.mkdir(parents=True, mode=mode)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists and is not empty; nothing is replaced", hint="another folder, or remove it by hand"
            ) from None
    yield
    files.sync_directory(path)


def _create(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    files.create_bytes(path, content, mode=mode)
    os.chmod(path, mode)
