"""HTTPS by a certificate of the operator's."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import json
import ssl
import threading
from http.client import HTTPSConnection
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpt_secure.errors import ConfigError
from fedpt_secure.serving import ApiKeys, HttpServer, Listener, ServeSettings, create_app


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "cert.pem", directory / "key.pem"


def test_it_answers_over_tls_and_says_where_the_large_model_is(make_run, certificate):
    settings = ServeSettings(name="tiny", port=0, tls_certificate=certificate[0], tls_key=certificate[1])
    listener, ready = Listener(settings), threading.Event()
    run = dataclasses.replace(make_run(), large_model_at="https://models.example/v1")
    server = HttpServer(create_app(run, settings, ApiKeys()), listener, settings, on_ready=ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        parts = urlsplit(listener.url)
        assert parts.scheme == "https"
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        connection = HTTPSConnection(parts.hostname, parts.port, timeout=20, context=trusting)
        connection.request("GET", "/v1/models")
        models = json.loads(connection.getresponse().read())["data"]
        connection.close()
        assert {model["large_model_at"] for model in models} == {"https://models.example/v1"}
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


def test_a_certificate_that_is_none_is_one_error(make_run, tmp_path):
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    settings = ServeSettings(name="tiny", port=0, tls_certificate=broken, tls_key=broken)
    listener = Listener(settings)
    try:
        with pytest.raises(ConfigError, match="TLS certificate"):
            HttpServer(create_app(make_run(), settings, ApiKeys()), listener, settings)
    finally:
        listener.socket.close()
