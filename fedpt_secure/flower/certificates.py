"""Certificates and keys of a federation's own making: for test networks, and for servers without a public name.

The authority signs nothing but this federation's server. Whoever has its key can pose as the server, which may drop
clients' messages but learns no update: that is what the roster and secure aggregation are for.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpt_secure.errors import ConfigError, IdentityError

AUTHORITY_DAYS = 730
SERVER_DAYS = 180
"""`federation renew` makes a new one under the same authority, which clients keep."""
_BEFORE = timedelta(hours=1)
"""Clients' clocks may be behind."""


def make_authority(name: str) -> tuple[bytes, bytes]:
    """A self-signed authority for one server: (key, certificate), PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:48]} authority")])
    certificate = (
        _certificate(subject, subject, key.public_key(), days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def make_server_certificate(hosts: list[str], *, authority_key: bytes, authority: bytes) -> tuple[bytes, bytes]:
    """A server's (key, certificate), PEM, good for these names and addresses.

    Raises:
        ConfigError: no host, one that cannot stand in a certificate, or a key that is not the authority's.
    """
    signer = load_pem_private_key(authority_key, password=None)
    issuer = x509.load_pem_x509_certificate(authority)
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != issuer.public_key():
        raise ConfigError("ca.key is not the key of ca.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "federation server")])
    certificate = (
        _certificate(subject, issuer.subject, key.public_key(), days=SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative_name(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def make_node_key() -> tuple[bytes, bytes]:
    """A SuperNode's (private, public) key, on P-384, in OpenSSH's format as Flower reads it."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def read_node_key(content: bytes) -> bytes:
    """The public key in a `NAME.pub` file, as Flower compares it.

    Raises:
        IdentityError: it is no public key of a SuperNode.
    """
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"not a public key in OpenSSH's format: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("a SuperNode's key is an ECDSA key", hint="`fedpt-secure federation init` makes one")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def expires(certificate: bytes) -> datetime:
    """When a PEM certificate ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(
            f"{host!r} cannot stand in a certificate: {error}", hint="a host name in ASCII, or an address"
        ) from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
