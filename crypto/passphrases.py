"""A short secret sealed under a passphrase: a key by Argon2id (RFC 9106), then XChaCha20-Poly1305.

The cost of Argon2id is fixed here and not read from a file, so that nobody can lower it, or raise it beyond a machine's
memory.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_KEYBYTES,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
)
from nacl.exceptions import CryptoError as NaClError
from nacl.pwhash import argon2id

from fedpt_secure.crypto.errors import ParameterError

SALT_BYTES: Final = argon2id.SALTBYTES
SEAL_BYTES: Final = crypto_aead_xchacha20poly1305_ietf_ABYTES
SHORTEST_PASSPHRASE: Final = 12
_LONGEST_PASSPHRASE: Final = 1024

_PASSES: Final = 3
_MEMORY_BYTES: Final = 256 << 20  # libsodium's "moderate", half a second; RFC 9106 asks for 64 MiB at three passes

# A constant nonce is safe because every key seals one message: its salt is fresh for that message.
_NONCE: Final = bytes(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES)


def check_passphrase(passphrase: str) -> None:
    """Accept a passphrase that is worth sealing with.

    Raises:
        ParameterError: it is too short, too long, or no valid Unicode. It is not quoted.
    """
    if not SHORTEST_PASSPHRASE <= len(passphrase) <= _LONGEST_PASSPHRASE:
        raise ParameterError(
            f"a passphrase has {SHORTEST_PASSPHRASE} to {_LONGEST_PASSPHRASE} characters, not {len(passphrase)}",
            hint="five or six words drawn at random are easy to type and hard to guess",
        )
    _encoded(passphrase)


def seal_with_passphrase(secret: bytes, passphrase: str, *, salt: bytes, data: bytes) -> bytes:
    """`secret` sealed: `SEAL_BYTES` longer.

    Args:
        salt: `SALT_BYTES` bytes, fresh and random for every call.
        data: what the seal is bound to; `open_with_passphrase` needs the same.

    Raises:
        ParameterError: the passphrase is not acceptable.
    """
    check_passphrase(passphrase)
    return crypto_aead_xchacha20poly1305_ietf_encrypt(secret, data, _NONCE, _key(passphrase, salt))


def open_with_passphrase(sealed: bytes, passphrase: str, *, salt: bytes, data: bytes) -> bytes:
    """The secret that `seal_with_passphrase` sealed.

    Raises:
        ParameterError: the passphrase is another one, or salt, data or sealed bytes were altered.
    """
    try:
        return crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, data, _NONCE, _key(passphrase, salt))
    except NaClError:
        raise ParameterError("the passphrase is wrong, or the file was altered") from None


def _key(passphrase: str, salt: bytes) -> bytes:
    return argon2id.kdf(
        crypto_aead_xchacha20poly1305_ietf_KEYBYTES,
        _encoded(passphrase),
        salt,
        opslimit=_PASSES,
        memlimit=_MEMORY_BYTES,
    )


def _encoded(passphrase: str) -> bytes:
    # Keyboards and systems differ in how they compose an accented letter; the passphrase is the same.
    try:
        return unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        raise ParameterError("the passphrase is not valid Unicode") from None
