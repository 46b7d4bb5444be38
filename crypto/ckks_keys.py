"""How clients come to share a CKKS key that the server never holds: channel keys, a dealer, and what it seals.

The dealer draws the CKKS key and a 32-byte group key. The CKKS key travels once, under the group key; the group key is
sealed for every other member under the X25519 channel between the two. A commitment to the group key, signed by the
dealer, makes sure that all members open the same: XChaCha20-Poly1305 alone lets one ciphertext open under two keys.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Final

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
)
from nacl.exceptions import CryptoError as NaClError

from fedpt_secure.crypto.ckks_messages import (
    ENTRY_BYTES,
    CkksAdvertisement,
    CkksKeyDirectory,
    CkksSession,
    advertisement_to_sign,
    decode,
    encode,
)
from fedpt_secure.crypto.errors import DuplicateKey, KeyRejected
from fedpt_secure.crypto.identities import Roster
from fedpt_secure.crypto.key_agreement import PUBLIC_KEY_BYTES, check_public_key
from fedpt_secure.crypto.labels import CkksLabel, derive_key, digest
from fedpt_secure.crypto.messages import decode_set, encode_set, split_records

GROUP_KEY_BYTES: Final = 32
ENVELOPE_OVERHEAD_BYTES: Final = crypto_aead_xchacha20poly1305_ietf_ABYTES

# A constant nonce is safe because every key seals exactly one message: the channel's is derived for one ordered pair of
# clients in one session, the envelope's from a group key that is drawn for one deal.
_NONCE: Final = bytes(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES)


class CkksDirectory:
    """The members' checked channel keys, their digest, and the dealer that follows from it.

    Attributes:
        members: positions of the clients whose keys are in it, sorted.
        channel_keys: by position.
        digest: 32 bytes that stand for all of it.
        dealer: position of the client that makes the round's CKKS key.
    """

    def __init__(self, advertisements: Mapping[int, CkksAdvertisement], session: CkksSession) -> None:
        self.members = tuple(sorted(advertisements))
        self.channel_keys = {member: advertisements[member].channel_key for member in self.members}
        self._message = CkksKeyDirectory(
            session=session.digest,
            members=encode_set(self.members, session.context),
            entries=b"".join(
                advertisements[member].channel_key + advertisements[member].signature for member in self.members
            ),
        )
        parts = (session.digest, self._message.members, self._message.entries)
        self.digest = digest(CkksLabel.DIRECTORY, parts)
        draw = digest(CkksLabel.DEALER, (session.digest, self.digest))
        # 256 bits modulo a cohort: the bias is below 2^-240.
        self.dealer = self.members[int.from_bytes(draw, "big") % len(self.members)]

    def to_bytes(self) -> bytes:
        """The message that tells it to every client."""
        return encode(self._message)

    @classmethod
    def from_bytes(cls, encoded: bytes, session: CkksSession, roster: Roster) -> CkksDirectory:
        """The directory in a message, every advertisement checked against the roster and against all others.

        Raises:
            MessageError: one is not acceptable; the subclass says why.
        """
        message = decode(encoded, CkksKeyDirectory, session, body_bytes=len(session.context.cohort) * ENTRY_BYTES)
        members = decode_set(message.members, session.context)
        entries = split_records(message.entries, count=len(members), size=ENTRY_BYTES, what="directory entries")
        advertisements: dict[int, CkksAdvertisement] = {}
        known: set[bytes] = set()
        for member, entry in zip(members, entries, strict=True):
            advertisement = CkksAdvertisement(
                session=session.digest,
                sender=member,
                channel_key=entry[:PUBLIC_KEY_BYTES],
                signature=entry[PUBLIC_KEY_BYTES:],
            )
            check_advertisement(advertisement, session, roster, known_keys=known)
            known.add(advertisement.channel_key)
            advertisements[member] = advertisement
        return cls(advertisements, session)


def check_advertisement(
    advertisement: CkksAdvertisement, session: CkksSession, roster: Roster, *, known_keys: set[bytes]
) -> None:
    """Accept an advertisement that is signed by its sender and whose key is safe and nobody else's.

    Raises:
        SignatureInvalid: the roster's key for the sender did not sign it for this session.
        UnsafePublicKey: the key has low order or is not canonical.
        DuplicateKey: the key is in `known_keys`.
    """
    client_id = session.context.cohort[advertisement.sender]
    signed = advertisement_to_sign(session, sender=advertisement.sender, channel_key=advertisement.channel_key)
    roster.verify(client_id, signed, advertisement.signature)
    check_public_key(advertisement.channel_key)
    if advertisement.channel_key in known_keys:
        raise DuplicateKey(f"client {client_id!r} advertises a public key that is already in use")


class GroupKey:
    """What the clients of one round share besides the CKKS key: it hides that key in transit and seeds the noise.

    Args:
        secret: 32 bytes; the buffer is the caller's to wipe.
        directory: digest of the key directory.
        dealer: id of the client that drew it.
    """

    def __init__(self, secret: bytearray, *, session: CkksSession, directory: bytes, dealer: str) -> None:
        self.secret = secret
        self._session = session
        self._origin = (directory, dealer.encode())

    @property
    def commitment(self) -> bytes:
        """32 bytes that bind the dealer to the group key and say nothing about it."""
        return self._derive(CkksLabel.KEY_COMMITMENT)

    def matches(self, commitment: bytes) -> bool:
        """Whether this is the key that was committed to."""
        return hmac.compare_digest(self.commitment, commitment)

    def close(self, ckks_key: bytes) -> bytes:
        """The CKKS key, readable by whoever has the group key."""
        data = digest(CkksLabel.ENVELOPE_DATA, (self._session.digest, *self._origin))
        key = self._derive(CkksLabel.ENVELOPE_KEY)
        return crypto_aead_xchacha20poly1305_ietf_encrypt(ckks_key, data, _NONCE, key)

    def open(self, envelope: bytes) -> bytes:
        """The CKKS key in an envelope.

        Raises:
            KeyRejected: it was closed with another key or for another transcript.
        """
        data = digest(CkksLabel.ENVELOPE_DATA, (self._session.digest, *self._origin))
        try:
            return crypto_aead_xchacha20poly1305_ietf_decrypt(
                envelope, data, _NONCE, self._derive(CkksLabel.ENVELOPE_KEY)
            )
        except (NaClError, ValueError):
            raise KeyRejected("the dealt CKKS key does not open") from None

    def flooding_key(self, statement: bytes) -> bytes:
        """The key of the noise on one sum, the same for everybody who decrypts it; `statement` is what all signed."""
        return self._derive(CkksLabel.FLOODING, statement)

    def _derive(self, label: CkksLabel, *parts: bytes) -> bytes:
        return derive_key(self.secret, salt=self._session.digest, label=label, parts=(*self._origin, *parts))


def seal_group_key(
    secret: bytearray, channel_secret: bytearray, *, session: CkksSession, directory: bytes, sender: str, receiver: str
) -> bytes:
    """The group key for one member: `SEALED_KEY_BYTES` bytes."""
    key, data = _channel(channel_secret, session, directory, sender, receiver)
    return crypto_aead_xchacha20poly1305_ietf_encrypt(bytes(secret), data, _NONCE, key)


def unseal_group_key(
    sealed: bytes, channel_secret: bytearray, *, session: CkksSession, directory: bytes, sender: str, receiver: str
) -> bytearray:
    """The group key that the dealer sealed for this member.

    Raises:
        KeyRejected: it was altered, or sealed by or for somebody else or in another session.
    """
    key, data = _channel(channel_secret, session, directory, sender, receiver)
    try:
        secret = bytearray(crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, data, _NONCE, key))
    except (NaClError, ValueError):
        secret = bytearray()
    if len(secret) != GROUP_KEY_BYTES:
        raise KeyRejected(
            f"the group key sealed by {sender!r} does not open: it was altered, or made for another receiver or round"
        )
    return secret


def sealed_keys_digest(sealed: Sequence[bytes]) -> bytes:
    """What stands for the sealed group keys, in the members' order, in the dealer's signature."""
    return digest(CkksLabel.SEALED_KEYS, sealed)


def _channel(
    secret: bytearray, session: CkksSession, directory: bytes, sender: str, receiver: str
) -> tuple[bytes, bytes]:
    """Key and associated data of the one message from the dealer to a member."""
    parts = (directory, sender.encode(), receiver.encode())
    key = derive_key(secret, salt=session.digest, label=CkksLabel.SEAL_KEY, parts=parts)
    return key, digest(CkksLabel.SEAL_DATA, (session.digest, *parts))
