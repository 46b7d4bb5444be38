"""What `federation init` writes."""

from __future__ import annotations

import stat

import pytest

from fedpt_secure.config import DataConfig, RunConfig, build
from fedpt_secure.crypto import load_identity
from fedpt_secure.errors import ConfigError, IdentityError
from fedpt_secure.flower import new_folders as made
from fedpt_secure.network.folder import ClientSettings, Endpoint
from fedpt_secure.privacy import Budget, Ledger

SECRET = ("identity.secret.json", "node.key", "ca.key", "server.key", "ledger.sqlite", "federation.toml")
CLIENTS = ("person one", "person-two", "dritte")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    config = build(RunConfig, {"privacy": {"epsilon": 7.0, "mode": "distributed"}})
    return made.make_test_network(tmp_path_factory.mktemp("net") / "fed", config, CLIENTS, Endpoint(port=8123))


def no_passphrase():
    raise AssertionError("asked for a passphrase")


def test_everybody_has_the_same_settings_and_roster(network):
    folders = [network.server, *network.clients.values()]
    for name in ("config.toml", "roster.json"):
        assert len({(folder.path / name).read_bytes() for folder in folders}) == 1
    assert list(network.server.roster()) == sorted(CLIENTS)


def test_every_client_has_its_own_key_which_stands_in_the_roster(network):
    for client, folder in network.clients.items():
        assert folder.settings().client_id == client
        own = load_identity(folder.identity, ask_passphrase=no_passphrase)
        assert own.client_id == client
        own.check_roster(folder.roster())
    assert len({folder.identity.read_bytes() for folder in network.clients.values()}) == len(CLIENTS)


def test_the_server_knows_every_nodes_key_and_none_of_their_secrets(network):
    assert len(list(network.server.nodes.glob("*.pub"))) == len(CLIENTS)
    names = {path.name for path in network.server.path.rglob("*") if path.is_file()}
    assert not names & {"identity.secret.json", "node.key"}
    for folder in network.clients.values():
        assert not (folder.path / "ca.key").exists()
        assert folder.certificate.read_bytes() == network.server.tls("ca.crt").read_bytes()


def test_what_is_secret_is_its_owners_alone(network):
    root = network.server.path.parent
    secrets = [path for path in root.rglob("*") if path.name in SECRET]
    assert len(secrets) == 4 * len(CLIENTS) + 3
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_clients_ledger_begins_with_a_budget_of_one_run(network):
    for folder in network.clients.values():
        budget = Ledger(folder.ledger).budget
        assert (budget.epsilon, budget.unit) == (7.0, "record")


def test_nothing_that_exists_is_replaced(network, tmp_path):
    before = {path: path.read_bytes() for path in network.server.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not empty"):
        made.make_server(network.server.path, RunConfig(), Endpoint())
    with pytest.raises(ConfigError, match="not empty"):
        made.make_test_network(network.server.path.parent, RunConfig(), CLIENTS, Endpoint())
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        made.make_server(tmp_path / "file", RunConfig(), Endpoint())


def test_an_insecure_network_has_no_certificates(tmp_path):
    network = made.make_test_network(tmp_path / "x", RunConfig(), CLIENTS, Endpoint(insecure=True))
    assert not network.server.tls("ca.crt").exists()
    assert not any(folder.certificate.exists() for folder in network.clients.values())


def test_ids_that_make_one_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the same"):
        made.make_test_network(tmp_path / "x", RunConfig(), ("a b", "a/b", "c"), Endpoint())


def test_an_unacceptable_id_leaves_nothing(tmp_path):
    settings = ClientSettings(client_id="a\nb")
    with pytest.raises(IdentityError):
        made.make_client(tmp_path / "x", settings, Budget(1.0, 1e-5, "record"))
    assert not (tmp_path / "x").exists()


def test_a_clients_signing_key_is_sealed_by_its_passphrase(tmp_path):
    settings = ClientSettings(client_id="a")
    client = made.make_client(
        tmp_path / "x", settings, Budget(1.0, 1e-5, "record"), ask_passphrase=lambda: "correct horse battery"
    )
    assert load_identity(client.folder.identity, ask_passphrase=lambda: "correct horse battery").client_id == "a"
    with pytest.raises(AssertionError, match="asked"):
        load_identity(client.folder.identity, ask_passphrase=no_passphrase)


def test_a_renewed_certificate_is_another_under_the_same_authority(tmp_path):
    server = made.make_server(tmp_path / "x", RunConfig(), Endpoint(host="fed.example.org"))
    before = {name: server.tls(name).read_bytes() for name in ("ca.crt", "server.pem", "server.key")}
    made.renew(server, server.settings().server)
    assert server.tls("ca.crt").read_bytes() == before["ca.crt"]
    for name in ("server.pem", "server.key"):
        assert server.tls(name).read_bytes() != before[name]
    assert stat.S_IMODE(server.tls("server.key").stat().st_mode) == 0o600
    server.tls("ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key"):
        made.renew(server, server.settings().server)


def test_only_text_without_owners_is_dealt():
    assert made.dealt(DataConfig(), 5).clients == 5
    owned = DataConfig(source="x.csv", client_column="who")
    assert made.dealt(owned, 5) == owned
