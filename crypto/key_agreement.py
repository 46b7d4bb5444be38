"""X25519 key agreement, and the keys derived from it.

A shared secret is never used as it is. HKDF binds it to the session (protocol version, suite, run, round,
attempt, cohort, roster, model, parameters), to the key directory (both public keys among them), to the
purpose and to the two parties.
"""

from __future__ import annotations

from typing import Final

from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError as NaClError

from fedpt_secure.crypto.errors import UnsafePublicKey
from fedpt_secure.crypto.labels import Label, derive_key
from fedpt_secure.crypto.randomness import RandomBytes

PUBLIC_KEY_BYTES: Final = 32

_FIELD_PRIME: Final = 2**255 - 19
_LOW_ORDER_U: Final = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""u-coordinates of all points of low order on Curve25519 and its twist (RFC 7748, section 7; Bernstein 2006)."""


class KeyPair:
    """A fresh X25519 key pair for one session; the private scalar lies in a buffer that `wipe` can overwrite."""

    def __init__(self, private: bytearray) -> None:
        self.private = private
        self.public = public_key(private)

    @classmethod
    def generate(cls, random_bytes: RandomBytes) -> KeyPair:
        """A pair from 32 fresh bytes (clamped inside X25519)."""
        return cls(bytearray(random_bytes(32)))


def public_key(private: bytes | bytearray) -> bytes:
    """X25519 of the base point (RFC 7748): 32 bytes."""
    return crypto_scalarmult_base(bytes(private))


def check_public_key(public: bytes) -> None:
    """Refuse keys whose shared secret is zero for every private key, and second encodings of a key.

    X25519 accepts several encodings of one point; honest clients send the canonical one, so that distinct
    bytes are distinct keys.

    Raises:
        UnsafePublicKey: the point has low order, or its encoding is not canonical.
    """
    u = int.from_bytes(public, "little")
    if len(public) != PUBLIC_KEY_BYTES or u >= _FIELD_PRIME or u in _LOW_ORDER_U:
        raise UnsafePublicKey(
            f"X25519 public key {public.hex()} has low order or is not canonical: its secrets may be known to everybody"
        )


def shared_secret(private: bytes | bytearray, public: bytes) -> bytearray:
    """X25519 (RFC 7748), 32 bytes, contributory: a zero result is refused.

    Raises:
        UnsafePublicKey: the public key has low order.
    """
    check_public_key(public)
    try:
        secret = crypto_scalarmult(bytes(private), public)
    except NaClError:
        raise UnsafePublicKey(f"X25519 with public key {public.hex()} gives zero") from None
    return bytearray(secret)


def seal_key(secret: bytearray, *, session_digest: bytes, directory_digest: bytes, sender: str, receiver: str) -> bytes:
    """The key that seals the one message from `sender` to `receiver`; the other direction has another key."""
    parts = (directory_digest, sender.encode(), receiver.encode())
    return derive_key(secret, salt=session_digest, label=Label.SEAL_KEY, parts=parts)


def pair_mask_key(
    secret: bytearray, *, session_digest: bytes, directory_digest: bytes, model_digest: bytes, one: str, other: str
) -> bytes:
    """The key of the mask that two clients share, the same for both: ids are ordered first.

    The model digest is an input of its own, though the session digest covers it: masks of two clients that
    hold different models cannot cancel (Pasquini et al. 2022), and a reader sees it here.
    """
    first, second = sorted((one, other))
    parts = (model_digest, directory_digest, first.encode(), second.encode())
    return derive_key(secret, salt=session_digest, label=Label.PAIR_MASK, parts=parts)


def self_mask_key(
    seed: bytearray, *, session_digest: bytes, directory_digest: bytes, model_digest: bytes, owner: str
) -> bytes:
    """The key of the mask that a client adds for itself, derived from its seed b_u."""
    parts = (model_digest, directory_digest, owner.encode())
    return derive_key(seed, salt=session_digest, label=Label.SELF_MASK, parts=parts)


def self_mask_commitment(seed: bytearray, *, session_digest: bytes, owner: str) -> bytes:
    """What a client publishes about its seed before sharing it, so that a seed rebuilt from false shares is noticed.

    Hiding: an HKDF output under a label of its own says nothing about the mask key. Binding: SHA-256 is
    collision-resistant.
    """
    return derive_key(seed, salt=session_digest, label=Label.SELF_COMMITMENT, parts=(owner.encode(),))
