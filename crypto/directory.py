"""The key directory of a round: every member's fresh public keys, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import DuplicateKey
from fedpt_secure.crypto.identities import Roster
from fedpt_secure.crypto.key_agreement import check_public_key
from fedpt_secure.crypto.messages import (
    ENTRY_BYTES,
    Advertisement,
    KeyDirectory,
    advertisement_from_entry,
    advertisement_to_sign,
    decode,
    decode_set,
    directory_digest,
    directory_entry,
    encode,
    encode_set,
    split_records,
)
from fedpt_secure.crypto.neighbours import NeighbourGraph

_KEYS_A_MEMBER: Final = 2


class Directory:
    """Checked advertisements by cohort position, their digest, and the graph that they determine.

    Attributes:
        members: positions of the clients whose keys are in it, sorted (U1 in the paper).
        advertisements: by position.
        digest: 32 bytes that stand for all of it in every later message.
        graph: who masks with whom and who holds whose shares.
    """

    def __init__(self, advertisements: Mapping[int, Advertisement], context: RoundContext) -> None:
        self.members = tuple(sorted(advertisements))
        self.advertisements = dict(advertisements)
        self._message = KeyDirectory(
            session=context.session_digest,
            members=encode_set(self.members, context),
            entries=b"".join(directory_entry(advertisements[member]) for member in self.members),
        )
        self.digest = directory_digest(context, self._message.members, self._message.entries)
        self.graph = NeighbourGraph(context, directory_digest=self.digest, members=self.members)

    def to_bytes(self) -> bytes:
        """The message that tells it to every client."""
        return encode(self._message)

    @classmethod
    def from_bytes(cls, encoded: bytes, context: RoundContext, roster: Roster) -> Directory:
        """The directory in a message, every advertisement checked against the roster and against all others.

        Raises:
            MessageError: one is not acceptable; the subclass says why.
        """
        message = decode(encoded, KeyDirectory, context, body_bytes=len(context.cohort) * ENTRY_BYTES)
        members = decode_set(message.members, context)
        entries = split_records(message.entries, count=len(members), size=ENTRY_BYTES, what="directory entries")
        advertisements: dict[int, Advertisement] = {}
        known: set[bytes] = set()
        for member, entry in zip(members, entries, strict=True):
            advertisement = advertisement_from_entry(entry, sender=member, context=context)
            check_advertisement(advertisement, context, roster, known_keys=known)
            known.update((advertisement.channel_key, advertisement.mask_key))
            advertisements[member] = advertisement
        return cls(advertisements, context)


def check_advertisement(
    advertisement: Advertisement, context: RoundContext, roster: Roster, *, known_keys: set[bytes]
) -> None:
    """Accept an advertisement that is signed by its sender and whose two keys are safe and nobody else's.

    Raises:
        SignatureInvalid: the roster's key for the sender did not sign it for this session.
        UnsafePublicKey: a key has low order or is not canonical.
        DuplicateKey: a key is in `known_keys`, or both keys are the same.
    """
    client_id = context.cohort[advertisement.sender]
    signed = advertisement_to_sign(
        context,
        sender=advertisement.sender,
        channel_key=advertisement.channel_key,
        mask_key=advertisement.mask_key,
        seed_commitment=advertisement.seed_commitment,
    )
    roster.verify(client_id, signed, advertisement.signature)
    keys = {advertisement.channel_key, advertisement.mask_key}
    for key in keys:
        check_public_key(key)
    if len(keys) != _KEYS_A_MEMBER or keys & known_keys:
        raise DuplicateKey(f"client {client_id!r} advertises a public key that is already in use")
