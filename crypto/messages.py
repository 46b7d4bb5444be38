"""The messages of the protocol: types, strict decoding, and the bytes that are signed.

Encoding: a message is one MessagePack array that opens with the message's number. Sets of clients are bitmaps
over the cohort's sorted ids; what belongs to the members of a set is a run of fixed-size records in the set's
order. So a message has no lists, names nobody twice, and has one size once the sets are known; every decoder
checks that size before it copies anything. There is exactly one accepted encoding of every message: what was
decoded is encoded again and compared.

Every message carries the session digest, which makes a mix-up a clear error. What stops a forger are the
signatures, which cover the session digest and, from the second phase on, everything that the sender saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import MalformedMessage, WrongSession
from fedpt_secure.crypto.identities import SIGNATURE_BYTES
from fedpt_secure.crypto.key_agreement import PUBLIC_KEY_BYTES
from fedpt_secure.crypto.labels import DIGEST_BYTES, Label, digest, integer
from fedpt_secure.crypto.structs import resolved

ENTRY_BYTES: Final = 2 * PUBLIC_KEY_BYTES + DIGEST_BYTES + SIGNATURE_BYTES
"""Size of one client's record in the key directory."""

_OVERHEAD_BYTES: Final = 512
"""More than the fixed-size fields and the framing of any message."""


@resolved
class Advertisement(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """Phase 1, client to server: fresh public keys, signed."""

    session: bytes
    sender: int
    channel_key: bytes
    mask_key: bytes
    seed_commitment: bytes
    signature: bytes


@resolved
class KeyDirectory(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """Phase 1, server to clients: the advertisements of all members, without session and sender."""

    session: bytes
    members: bytes
    entries: bytes


@resolved
class SealedShares(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """Phase 2, client to server: one sealed pair of shares for each neighbour, signed."""

    session: bytes
    sender: int
    sealed: bytes
    signature: bytes


@resolved
class ShareInbox(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """Phase 2, server to one client: who shared keys, and the pairs sealed for it by those of its neighbours."""

    session: bytes
    sharers: bytes
    sealed: bytes


@resolved
class MaskedVector(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """Phase 3, client to server: the masked vector, packed, with the sharers it is masked against, signed."""

    session: bytes
    sender: int
    sharers: bytes
    vector: memoryview
    signature: bytes


@resolved
class Survivors(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """Phase 3, server to clients: whose masked vectors are in the sum."""

    session: bytes
    survivors: bytes


@resolved
class Confirmation(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=7):
    """Phase 4, client to server: a signature on the survivor list that the client was shown."""

    session: bytes
    sender: int
    signature: bytes


@resolved
class Confirmations(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=8):
    """Phase 4, server to clients: who confirmed, and their signatures."""

    session: bytes
    confirmed: bytes
    signatures: bytes


@resolved
class Unmasking(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=9):
    """Phase 5, client to server: exactly one share of each peer, signed.

    Which kind it is follows from the survivor list alone: the seed's for survivors, the mask key's for
    dropouts. The format has no room for both.
    """

    session: bytes
    sender: int
    shares: bytes
    signature: bytes


Message = (
    Advertisement
    | KeyDirectory
    | SealedShares
    | ShareInbox
    | MaskedVector
    | Survivors
    | Confirmation
    | Confirmations
    | Unmasking
)

_Message = TypeVar(
    "_Message",
    Advertisement,
    KeyDirectory,
    SealedShares,
    ShareInbox,
    MaskedVector,
    Survivors,
    Confirmation,
    Confirmations,
    Unmasking,
)

_FIXED_SIZES: Final = {
    "session": DIGEST_BYTES,
    "channel_key": PUBLIC_KEY_BYTES,
    "mask_key": PUBLIC_KEY_BYTES,
    "seed_commitment": DIGEST_BYTES,
    "signature": SIGNATURE_BYTES,
}


def encode(message: Message) -> bytes:
    """The canonical bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode(encoded: bytes, kind: type[_Message], context: RoundContext, *, body_bytes: int = 0) -> _Message:
    """The message of type `kind` in `encoded`, with its session, sender and sizes of fixed fields checked.

    Args:
        encoded: what came over the wire.
        kind: the one type that is acceptable now.
        context: the receiver's own.
        body_bytes: the size of the longest field that may follow; longer input is refused before it is parsed.

    Raises:
        MalformedMessage: not the canonical encoding of such a message.
        WrongSession: made for another session.
    """
    name = kind.__name__
    bitmap_bytes = _bitmap_bytes(context)
    limit = body_bytes + bitmap_bytes + _OVERHEAD_BYTES
    if not isinstance(encoded, bytes) or len(encoded) > limit:
        raise MalformedMessage(f"a {name} is at most {limit} bytes; this is {_describe(encoded)}")
    try:
        message = msgspec.msgpack.decode(encoded, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a {name}: {error}") from None
    for field, size in _FIXED_SIZES.items():
        if len(getattr(message, field, bytes(size))) != size:
            raise MalformedMessage(f"the {field} of a {name} has {size} bytes")
    if not 0 <= getattr(message, "sender", 0) < len(context.cohort):
        raise MalformedMessage(f"the sender of a {name} is a position in the cohort of {len(context.cohort)}")
    if encode(message) != encoded:
        raise MalformedMessage(f"a {name} is not in its canonical encoding")
    if message.session != context.session_digest:
        raise WrongSession(
            f"a {name} belongs to session {message.session.hex()[:16]}..., not {context.session_digest.hex()[:16]}...",
            hint="run, round, attempt, cohort, roster, model and parameters must be the same for everybody",
        )
    return message


def _describe(encoded: object) -> str:
    return f"{len(encoded)} bytes long" if isinstance(encoded, bytes) else f"a {type(encoded).__name__}"


def _bitmap_bytes(context: RoundContext) -> int:
    return (len(context.cohort) + 7) // 8


def encode_set(members: Iterable[int], context: RoundContext) -> bytes:
    """A set of cohort positions as a bitmap: position i is bit i % 8 of byte i // 8."""
    bitmap = bytearray(_bitmap_bytes(context))
    for member in members:
        bitmap[member // 8] |= 1 << member % 8
    return bytes(bitmap)


def decode_set(bitmap: bytes, context: RoundContext) -> tuple[int, ...]:
    """The sorted positions in a bitmap.

    Raises:
        MalformedMessage: its length does not fit the cohort, or it names positions beyond it.
    """
    size = len(context.cohort)
    if len(bitmap) != _bitmap_bytes(context) or int.from_bytes(bitmap, "little") >> size:
        raise MalformedMessage(f"a set of clients is not a bitmap over a cohort of {size}")
    return tuple(position for position in range(size) if bitmap[position // 8] >> position % 8 & 1)


def split_records(records: bytes, *, count: int, size: int, what: str) -> Iterator[bytes]:
    """The `count` records of `size` bytes that follow one another in `records`.

    Raises:
        MalformedMessage: the length is another one.
    """
    if len(records) != count * size:
        raise MalformedMessage(f"{count} {what} take {count * size} bytes, not {len(records)}")
    return (records[start : start + size] for start in range(0, count * size, size))


def directory_entry(advertisement: Advertisement) -> bytes:
    """One client's record in the key directory."""
    return advertisement.channel_key + advertisement.mask_key + advertisement.seed_commitment + advertisement.signature


def advertisement_from_entry(entry: bytes, *, sender: int, context: RoundContext) -> Advertisement:
    """The advertisement that a directory record stands for."""
    keys_end = 2 * PUBLIC_KEY_BYTES
    return Advertisement(
        session=context.session_digest,
        sender=sender,
        channel_key=entry[:PUBLIC_KEY_BYTES],
        mask_key=entry[PUBLIC_KEY_BYTES:keys_end],
        seed_commitment=entry[keys_end : keys_end + DIGEST_BYTES],
        signature=entry[keys_end + DIGEST_BYTES :],
    )


def directory_digest(context: RoundContext, members: bytes, entries: bytes) -> bytes:
    """What stands for every public key of the round in all later messages."""
    return digest(Label.DIRECTORY, (context.session_digest, members, entries))


def advertisement_to_sign(
    context: RoundContext, *, sender: int, channel_key: bytes, mask_key: bytes, seed_commitment: bytes
) -> bytes:
    """What an advertisement's signature covers."""
    parts = (context.session_digest, integer(sender), channel_key, mask_key, seed_commitment)
    return digest(Label.SIGN_ADVERTISEMENT, parts)


def shares_to_sign(context: RoundContext, *, directory: bytes, sender: int, sealed: bytes) -> bytes:
    """What the signature on sealed shares covers; `directory` is the directory's digest."""
    return digest(Label.SIGN_SHARES, (context.session_digest, directory, integer(sender), sealed))


def masked_to_sign(
    context: RoundContext, *, directory: bytes, sender: int, sharers: bytes, vector: bytes | memoryview
) -> bytes:
    """What the signature on a masked vector covers."""
    parts = (context.session_digest, directory, integer(sender), sharers, vector)
    return digest(Label.SIGN_MASKED, parts)


def survivors_to_sign(context: RoundContext, *, directory: bytes, sharers: bytes, survivors: bytes) -> bytes:
    """What a confirmation signs: the same bytes for every client that was shown the same round."""
    return digest(Label.SIGN_SURVIVORS, (context.session_digest, directory, sharers, survivors))


def unmasking_to_sign(
    context: RoundContext, *, directory: bytes, sender: int, sharers: bytes, survivors: bytes, shares: bytes
) -> bytes:
    """What the signature on unmasking shares covers."""
    parts = (context.session_digest, directory, integer(sender), sharers, survivors, shares)
    return digest(Label.SIGN_UNMASKING, parts)
