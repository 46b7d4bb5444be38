"""The messages of aggregation under CKKS: session, types, strict decoding, and the bytes that are signed.

The rules are those of the mask protocol (`messages.py`): one MessagePack array that opens with the message's number,
sizes checked before anything is parsed, exactly one accepted encoding, the session in every message, signatures over
the session and all that the sender saw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import numpy as np

from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import MalformedMessage, ParameterError, WrongSession
from fedpt_secure.crypto.identities import SIGNATURE_BYTES
from fedpt_secure.crypto.key_agreement import PUBLIC_KEY_BYTES
from fedpt_secure.crypto.labels import DIGEST_BYTES, CkksLabel, digest, integer
from fedpt_secure.crypto.messages import encode_set
from fedpt_secure.crypto.structs import resolved

CKKS_VERSION: Final = 1
CKKS_SUITE: Final = "Ed25519/X25519/HKDF-SHA256/XChaCha20-Poly1305/AES-256-CTR/CKKS-TenSEAL-0.3.18"
"""Names of the primitives; part of every session digest. TenSEAL's version is there because the serialisation of keys
and ciphertexts is its own."""

ENTRY_BYTES: Final = PUBLIC_KEY_BYTES + SIGNATURE_BYTES
"""Size of one client's record in the key directory."""

SEALED_KEY_BYTES: Final = 32 + 16
"""Size of the group key sealed for one member: 32 bytes and a tag."""

ANSWER_BYTES: Final = 4
"""Size of one coordinate of a decryption."""

_LENGTH_BYTES: Final = 4
_OVERHEAD_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class CkksSession:
    """One round and its CKKS parameters, under one digest that everything signed or derived is bound to.

    Attributes:
        context: the round; its ring bits and neighbour graph mean nothing here.
        parameters: fitted to the round.

    Raises:
        ParameterError: round and parameters do not fit each other, or the quorum is no majority.
    """

    context: RoundContext
    parameters: CkksParameters
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        context, parameters = self.context, self.parameters
        if context.degree is not None:
            raise ParameterError("aggregation under CKKS has no neighbour graph; the round's degree must be None")
        if parameters.length != context.vector_length:
            raise ParameterError(
                f"the parameters are for vectors of {parameters.length} coordinates, the round's have "
                f"{context.vector_length}"
            )
        if parameters.cohort < len(context.cohort):
            raise ParameterError(
                f"the parameters leave room for {parameters.cohort} vectors, the cohort has {len(context.cohort)}"
            )
        if 2 * context.threshold <= len(context.cohort):
            raise ParameterError(
                f"a threshold of {context.threshold} is no majority of {len(context.cohort)} clients: "
                "two decryptions could both be agreed on"
            )
        parts = (
            context.session_digest,
            integer(CKKS_VERSION),
            CKKS_SUITE.encode(),
            integer(parameters.degree),
            integer(len(parameters.prime_bits)),
            *(integer(bits) for bits in parameters.prime_bits),
            integer(parameters.scale_bits),
            integer(parameters.flooding_bits),
            integer(parameters.cohort),
            parameters.bound.hex().encode(),
        )
        object.__setattr__(self, "digest", digest(CkksLabel.SESSION, parts))

    @property
    def quorum(self) -> int:
        """Clients that must confirm the list of survivors, and that must agree on the decryption."""
        return self.context.threshold


@resolved
class CkksAdvertisement(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=33):
    """Phase 1, client to server: a fresh channel key, signed."""

    session: bytes
    sender: int
    channel_key: bytes
    signature: bytes


@resolved
class CkksKeyDirectory(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=34):
    """Phase 1, server to clients: channel keys and signatures of all members."""

    session: bytes
    members: bytes
    entries: bytes


@resolved
class KeyDeal(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=35):
    """Phase 2, dealer to server: the CKKS key under a group key, and the group key sealed for every other member."""

    session: bytes
    sender: int
    commitment: bytes
    envelope: bytes
    sealed: bytes
    signature: bytes


@resolved
class KeyReady(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=36):
    """Phase 2, any other client to server: the directory was accepted, signed."""

    session: bytes
    sender: int
    signature: bytes


@resolved
class KeyInbox(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=37):
    """Phase 2, server to one client: who goes on, and the deal as far as it concerns the client."""

    session: bytes
    sharers: bytes
    commitment: bytes
    envelope: bytes
    sealed_digest: bytes
    sealed: bytes
    signature: bytes


@resolved
class EncryptedVector(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=38):
    """Phase 3, client to server: the vector's ciphertexts, signed."""

    session: bytes
    sender: int
    sharers: bytes
    ciphertexts: bytes
    signature: bytes


@resolved
class CkksSurvivors(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=39):
    """Phase 3, server to clients: whose ciphertexts are in the sum, their digests, and the digest of the sum."""

    session: bytes
    survivors: bytes
    digests: bytes
    total: bytes


@resolved
class CkksConfirmation(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=40):
    """Phase 4, client to server: a signature on the survivors and the sum that the client was shown."""

    session: bytes
    sender: int
    signature: bytes


@resolved
class CkksConfirmations(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=41):
    """Phase 4, server to clients: who confirmed, their signatures, and the encrypted sum."""

    session: bytes
    confirmed: bytes
    signatures: bytes
    total: bytes


@resolved
class Decryption(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=42):
    """Phase 5, client to server: the sum with its flooding noise, little-endian int32 steps, signed."""

    session: bytes
    sender: int
    values: bytes
    signature: bytes


CkksMessage = (
    CkksAdvertisement
    | CkksKeyDirectory
    | KeyDeal
    | KeyReady
    | KeyInbox
    | EncryptedVector
    | CkksSurvivors
    | CkksConfirmation
    | CkksConfirmations
    | Decryption
)

_Message = TypeVar(
    "_Message",
    CkksAdvertisement,
    CkksKeyDirectory,
    KeyDeal,
    KeyReady,
    KeyInbox,
    EncryptedVector,
    CkksSurvivors,
    CkksConfirmation,
    CkksConfirmations,
    Decryption,
)

_FIXED_SIZES: Final = {
    "session": DIGEST_BYTES,
    "channel_key": PUBLIC_KEY_BYTES,
    "commitment": DIGEST_BYTES,
    "sealed_digest": DIGEST_BYTES,
    "signature": SIGNATURE_BYTES,
}


def encode(message: CkksMessage) -> bytes:
    """The canonical bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode(encoded: bytes, kind: type[_Message], session: CkksSession, *, body_bytes: int = 0) -> _Message:
    """The message of type `kind` in `encoded`, with its session, sender and sizes of fixed fields checked.

    Args:
        encoded: what came over the wire.
        kind: the one type that is acceptable now.
        session: the receiver's own.
        body_bytes: the size of all fields of variable size; longer input is refused before it is parsed.

    Raises:
        MalformedMessage: not the canonical encoding of such a message.
        WrongSession: made for another session.
    """
    name, size = kind.__name__, len(session.context.cohort)
    limit = body_bytes + (size + 7) // 8 + _OVERHEAD_BYTES
    if not isinstance(encoded, bytes) or len(encoded) > limit:
        raise MalformedMessage(f"a {name} is at most {limit} bytes")
    try:
        message = msgspec.msgpack.decode(encoded, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a {name}: {error}") from None
    for fixed, expected in _FIXED_SIZES.items():
        if len(getattr(message, fixed, bytes(expected))) != expected:
            raise MalformedMessage(f"the {fixed} of a {name} has {expected} bytes")
    if not 0 <= getattr(message, "sender", 0) < size:
        raise MalformedMessage(f"the sender of a {name} is a position in the cohort of {size}")
    if encode(message) != encoded:
        raise MalformedMessage(f"a {name} is not in its canonical encoding")
    if message.session != session.digest:
        raise WrongSession(
            f"a {name} belongs to session {message.session.hex()[:16]}..., not {session.digest.hex()[:16]}...",
            hint="run, round, attempt, cohort, roster, model and parameters must be the same for everybody",
        )
    return message


def pack_ciphertexts(ciphertexts: Iterable[bytes]) -> bytes:
    """A vector's ciphertexts in a row, each after its length as four big-endian bytes."""
    return b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in ciphertexts)


def unpack_ciphertexts(packed: bytes, parameters: CkksParameters) -> list[bytes]:
    """The ciphertexts that `pack_ciphertexts` put in a row.

    Raises:
        MalformedMessage: they are more or fewer than those of one vector.
    """
    parts, end = [], 0
    for _ in range(parameters.ciphertexts):
        start = end + _LENGTH_BYTES
        end = start + int.from_bytes(packed[end:start], "big")
        parts.append(packed[start:end])
    # What is cut short leaves the end beyond the bytes that there are.
    if end != len(packed):
        raise MalformedMessage(f"these are not the {parameters.ciphertexts} ciphertexts of a vector")
    return parts


def ciphertexts_digest(packed: bytes) -> bytes:
    """What stands for a vector's ciphertexts, or for a sum's."""
    return digest(CkksLabel.CIPHERTEXTS, (packed,))


def largest_vector_bytes(parameters: CkksParameters) -> int:
    """One vector's ciphertexts, packed, take no more."""
    return parameters.ciphertexts * (parameters.largest_ciphertext_bytes + _LENGTH_BYTES)


def answer_to_bytes(answer: np.ndarray[tuple[int], np.dtype[np.int32]]) -> bytes:
    """The wire form of a decryption."""
    return answer.astype("<i4").tobytes()


def answer_from_bytes(values: bytes, parameters: CkksParameters) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The decryption `[length]` in its wire form.

    Raises:
        MalformedMessage: it has another length.
    """
    if len(values) != parameters.length * ANSWER_BYTES:
        raise MalformedMessage(f"{parameters.length} coordinates take {parameters.length * ANSWER_BYTES} bytes")
    return np.frombuffer(values, dtype="<i4").astype(np.int32)


def advertisement_to_sign(session: CkksSession, *, sender: int, channel_key: bytes) -> bytes:
    """What an advertisement's signature covers."""
    return digest(CkksLabel.SIGN_ADVERTISEMENT, (session.digest, integer(sender), channel_key))


def deal_to_sign(
    session: CkksSession, *, directory: bytes, sender: int, commitment: bytes, envelope: bytes, sealed_digest: bytes
) -> bytes:
    """What the dealer signs; it stands for the dealt key in all later messages."""
    parts = (session.digest, directory, integer(sender), commitment, envelope, sealed_digest)
    return digest(CkksLabel.SIGN_DEAL, parts)


def ready_to_sign(session: CkksSession, *, directory: bytes, sender: int) -> bytes:
    """What a client that is not the dealer signs in phase 2."""
    return digest(CkksLabel.SIGN_READY, (session.digest, directory, integer(sender)))


def vector_to_sign(session: CkksSession, *, deal: bytes, sender: int, sharers: bytes, ciphertexts: bytes) -> bytes:
    """What the signature on a vector covers; `deal` and `ciphertexts` are digests."""
    return digest(CkksLabel.SIGN_VECTOR, (session.digest, deal, integer(sender), sharers, ciphertexts))


def survivors_to_sign(
    session: CkksSession, *, deal: bytes, sharers: Iterable[int], survivors: Iterable[int], digests: bytes, total: bytes
) -> bytes:
    """What a confirmation signs: the same bytes for every client that was shown the same round."""
    sets = (encode_set(sharers, session.context), encode_set(survivors, session.context))
    return digest(CkksLabel.SIGN_SURVIVORS, (session.digest, deal, *sets, digests, total))


def decryption_to_sign(session: CkksSession, *, statement: bytes, sender: int, values: bytes) -> bytes:
    """What the signature on a decryption covers; `statement` is what confirmations sign."""
    return digest(CkksLabel.SIGN_DECRYPTION, (session.digest, statement, integer(sender), values))
