"""Certificates that TLS stacks accept, for the names they are for and no others."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest

from fedpt_secure.errors import ConfigError, IdentityError
from fedpt_secure.flower import certificates as made


def handshake(tmp_path, authority, key, certificate, *, name):
    """A TLS handshake over a socket pair, as a client that knows only `authority` and asks for `name`."""
    (tmp_path / "server.pem").write_bytes(certificate)
    (tmp_path / "server.key").write_bytes(key)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    asking = ssl.create_default_context(cadata=authority.decode())
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve():
        with there:
            try:
                with serving.wrap_socket(there, server_side=True):
                    pass
            except OSError:
                pass  # the client refused

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with here, asking.wrap_socket(here, server_hostname=name) as connection:
            return connection.version()
    finally:
        thread.join()


@pytest.fixture(scope="module")
def authority():
    return made.make_authority("test")


@pytest.mark.parametrize("name", ["fed.example.org", "127.0.0.1", "::1", "localhost"])
def test_a_strict_client_accepts_the_server_under_its_names(tmp_path, authority, name):
    key, certificate = made.make_server_certificate(
        ["fed.example.org", "localhost", "127.0.0.1", "::1"], authority_key=authority[0], authority=authority[1]
    )
    assert handshake(tmp_path, authority[1], key, certificate, name=name) == "TLSv1.3"


def test_a_client_refuses_another_name_and_another_authority(tmp_path, authority):
    key, certificate = made.make_server_certificate(
        ["fed.example.org"], authority_key=authority[0], authority=authority[1]
    )
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(tmp_path, authority[1], key, certificate, name="other.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, made.make_authority("other")[1], key, certificate, name="fed.example.org")


def test_a_servers_certificate_cannot_sign_another(tmp_path, authority):
    key, certificate = made.make_server_certificate(["a.example"], authority_key=authority[0], authority=authority[1])
    false_key, false_certificate = made.make_server_certificate(["b.example"], authority_key=key, authority=certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority[1], false_key, false_certificate + certificate, name="b.example")


def test_validity_is_as_stated(authority):
    certificate = made.make_server_certificate(["a.example"], authority_key=authority[0], authority=authority[1])[1]
    for content, days in ((authority[1], made.AUTHORITY_DAYS), (certificate, made.SERVER_DAYS)):
        assert abs(made.expires(content) - datetime.now(UTC) - timedelta(days=days)) < timedelta(minutes=5)


def test_a_key_of_another_authority_is_refused(authority):
    with pytest.raises(ConfigError, match="not the key"):
        made.make_server_certificate(["a"], authority_key=made.make_authority("other")[0], authority=authority[1])


def test_a_host_that_cannot_stand_in_a_certificate_is_refused(authority):
    with pytest.raises(ConfigError, match="cannot stand"):
        made.make_server_certificate(["bücher.example"], authority_key=authority[0], authority=authority[1])


def test_a_nodes_key_is_read_as_flower_reads_it():
    private, public = made.make_node_key()
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    key = load_ssh_private_key(private, None)
    assert uses_nist_ec_curve(key.public_key())
    assert public_key_to_bytes(key.public_key()) == made.read_node_key(public)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"ssh-ed25519 AAAA x"])
def test_what_is_no_nodes_key_is_refused(content):
    with pytest.raises(IdentityError):
        made.read_node_key(content)


def test_an_ed25519_key_is_no_nodes_key():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    with pytest.raises(IdentityError, match="ECDSA"):
        made.read_node_key(key)
