"""The one table of domain-separation labels, and the one way bytes are bound to them.

Everything that is signed, derived, committed to or authenticated passes through `digest` or `derive_key` with
a label of its own, so that bytes made for one purpose mean nothing for another. `docs/protocol.md` lists what
each label covers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import Enum
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PROTOCOL_VERSION: Final = 1
SUITE: Final = "Ed25519/X25519/HKDF-SHA256/XChaCha20-Poly1305/AES-256-CTR/Shamir-2^256+297"
"""Names of the primitives; part of every session digest, so that two suites never talk past each other."""

DIGEST_BYTES: Final = 32


class Label(Enum):
    """What a digest or a key is for. Values are on the wire: changing one is a new protocol version."""

    ROSTER = "fedpt-secagg/1 roster"
    SESSION = "fedpt-secagg/1 session"
    DIRECTORY = "fedpt-secagg/1 key directory"
    GRAPH = "fedpt-secagg/1 neighbour graph"
    SIGN_ADVERTISEMENT = "fedpt-secagg/1 sign advertisement"
    SIGN_SHARES = "fedpt-secagg/1 sign sealed shares"
    SIGN_MASKED = "fedpt-secagg/1 sign masked vector"
    SIGN_SURVIVORS = "fedpt-secagg/1 sign survivor list"
    SIGN_UNMASKING = "fedpt-secagg/1 sign unmasking shares"
    SEAL_KEY = "fedpt-secagg/1 key that seals shares"
    SEAL_DATA = "fedpt-secagg/1 associated data of sealed shares"
    PAIR_MASK = "fedpt-secagg/1 pairwise mask key"
    SELF_MASK = "fedpt-secagg/1 self mask key"
    SELF_COMMITMENT = "fedpt-secagg/1 self mask commitment"


class CkksLabel(Enum):
    """The same for aggregation under CKKS, which is a protocol of its own (`docs/ckks.md`)."""

    SESSION = "fedpt-ckks/1 session"
    DIRECTORY = "fedpt-ckks/1 key directory"
    DEALER = "fedpt-ckks/1 choice of the dealer"
    SIGN_ADVERTISEMENT = "fedpt-ckks/1 sign advertisement"
    SIGN_DEAL = "fedpt-ckks/1 sign dealt key"
    SIGN_READY = "fedpt-ckks/1 sign readiness"
    SIGN_VECTOR = "fedpt-ckks/1 sign encrypted vector"
    SIGN_SURVIVORS = "fedpt-ckks/1 sign survivors and their sum"
    SIGN_DECRYPTION = "fedpt-ckks/1 sign decryption"
    CIPHERTEXTS = "fedpt-ckks/1 ciphertexts"
    SEALED_KEYS = "fedpt-ckks/1 sealed group keys"
    ANSWER = "fedpt-ckks/1 decrypted values"
    SEAL_KEY = "fedpt-ckks/1 key that seals the group key"
    SEAL_DATA = "fedpt-ckks/1 associated data of the group key"
    ENVELOPE_KEY = "fedpt-ckks/1 key that seals the CKKS key"
    ENVELOPE_DATA = "fedpt-ckks/1 associated data of the CKKS key"
    KEY_COMMITMENT = "fedpt-ckks/1 group key commitment"
    FLOODING = "fedpt-ckks/1 flooding noise key"


class NetworkLabel(Enum):
    """What is signed outside rounds (`docs/federation.md`)."""

    SIGN_PRESENCE = "fedpt-network/1 sign presence"


AnyLabel = Label | CkksLabel | NetworkLabel


def integer(value: int) -> bytes:
    """`value` as eight big-endian bytes, the only form in which numbers are hashed."""
    return value.to_bytes(8, "big")


def digest(label: AnyLabel, parts: Iterable[bytes | memoryview]) -> bytes:
    """SHA-256 over the label and the parts, each preceded by its length in eight bytes.

    The framing is injective: two different sequences of parts never give the same hash input.
    """
    state = hashlib.sha256()
    for part in (label.value.encode(), *parts):
        state.update(integer(len(part)))
        state.update(part)
    return state.digest()


def derive_key(secret: bytes | bytearray, *, salt: bytes, label: AnyLabel, parts: Iterable[bytes]) -> bytes:
    """HKDF-SHA256 (RFC 5869) of a secret: 32 bytes, bound to `salt`, `label` and `parts`.

    Args:
        secret: input key material with at least 256 bits of entropy, or an X25519 shared secret.
        salt: the session digest, so that nothing derived in one session is of use in another.
        label: the purpose.
        parts: what else the key is for; hashed by `digest` into the `info` input.
    """
    kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=digest(label, parts))
    return kdf.derive(bytes(secret))
