"""Sealing the two shares that one client sends another: XChaCha20-Poly1305 with the transcript as associated data."""

from __future__ import annotations

from typing import Final

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
)
from nacl.exceptions import CryptoError as NaClError

from fedpt_secure.crypto.errors import InvalidShare, ShareRejected
from fedpt_secure.crypto.labels import Label, digest, integer
from fedpt_secure.crypto.shamir import SHARE_BYTES, decode_share

SEALED_BYTES: Final = 2 * SHARE_BYTES + crypto_aead_xchacha20poly1305_ietf_ABYTES
"""Size of a sealed pair of shares."""

# A constant nonce is safe because every key seals exactly one message: it is derived from X25519 keys that
# are fresh for the session, for one ordered pair of clients, and the state machine that seals is single-use.
_NONCE: Final = bytes(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES)


def associated_data(*, session_digest: bytes, directory_digest: bytes, sender: str, receiver: str, point: int) -> bytes:
    """What a sealed pair is bound to: session, every public key of the round, both parties, and the share's point."""
    parts = (session_digest, directory_digest, sender.encode(), receiver.encode(), integer(point))
    return digest(Label.SEAL_DATA, parts)


def seal(key: bytes, mask_key_share: bytearray, seed_share: bytearray, *, data: bytes) -> bytes:
    """Encrypt a share of the private mask key and a share of the self-mask seed: `SEALED_BYTES` bytes."""
    plain = bytes(mask_key_share) + bytes(seed_share)
    return crypto_aead_xchacha20poly1305_ietf_encrypt(plain, data, _NONCE, key)


def unseal(key: bytes, sealed: bytes, *, data: bytes, sender: str) -> tuple[bytearray, bytearray]:
    """The two shares in a sealed pair: of the sender's private mask key and of its self-mask seed.

    Raises:
        ShareRejected: the pair was not sealed with this key for this transcript, or holds no shares.
    """
    try:
        plain = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, data, _NONCE, key)
    except (NaClError, ValueError):
        raise ShareRejected(
            f"the share sealed by {sender!r} does not open: it was altered, or made for another receiver or round"
        ) from None
    mask_key_share, seed_share = bytearray(plain[:SHARE_BYTES]), bytearray(plain[SHARE_BYTES:])
    try:
        decode_share(mask_key_share)
        decode_share(seed_share)
    except InvalidShare:
        raise ShareRejected(f"what {sender!r} sealed is no pair of shares") from None
    return mask_key_share, seed_share
