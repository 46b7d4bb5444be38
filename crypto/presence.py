"""Who is there, before any round: a client signs the server's question with its identity.

The answer only tells a server where to send a client's messages. It opens nothing: every message of a round is signed
again, for its own session.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from fedpt_secure.crypto.errors import MalformedMessage
from fedpt_secure.crypto.identities import SIGNATURE_BYTES, Identity, Roster
from fedpt_secure.crypto.labels import DIGEST_BYTES, NetworkLabel, digest
from fedpt_secure.crypto.structs import resolved

NONCE_BYTES: Final = 32
RUN_ID_BYTES: Final = 16
_LARGEST: Final = 2048


@resolved
class Hello(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=101):
    """Server to whoever can be reached: which run this is, and a nonce that no earlier answer fits.

    Attributes:
        run_id: 16 bytes.
        config_digest: SHA-256 of the run's terms.
        roster_digest: of the roster that the server uses.
        nonce: 32 fresh random bytes.
    """

    run_id: bytes
    config_digest: bytes
    roster_digest: bytes
    nonce: bytes

    def to_bytes(self) -> bytes:
        """The canonical encoding."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Hello:
        """Decode.

        Raises:
            MalformedMessage: not the canonical encoding of a hello.
        """
        hello = _decode(encoded, cls)
        sizes = {
            "run_id": RUN_ID_BYTES,
            "config_digest": DIGEST_BYTES,
            "roster_digest": DIGEST_BYTES,
            "nonce": NONCE_BYTES,
        }
        for field, size in sizes.items():
            if len(getattr(hello, field)) != size:
                raise MalformedMessage(f"{field} of a hello has {size} bytes")
        return hello

    def to_sign(self, client_id: str) -> bytes:
        """What the client of this id signs."""
        parts = (self.run_id, self.config_digest, self.roster_digest, self.nonce, client_id.encode())
        return digest(NetworkLabel.SIGN_PRESENCE, parts)


@resolved
class Presence(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=102):
    """Client to server: its id, and its signature on the hello."""

    client_id: str
    signature: bytes

    @classmethod
    def sign(cls, hello: Hello, client_id: str, identity: Identity) -> Presence:
        """Answer a hello."""
        return cls(client_id, identity.sign(hello.to_sign(client_id)))

    def to_bytes(self) -> bytes:
        """The canonical encoding."""
        return msgspec.msgpack.encode(self)


def proven_id(encoded: bytes, hello: Hello, roster: Roster) -> str:
    """The id of the client that answered `hello` with these bytes.

    Raises:
        MalformedMessage: not the canonical encoding of an answer.
        SignatureInvalid: the roster's client of that id did not sign it.
    """
    presence = _decode(encoded, Presence)
    if len(presence.signature) != SIGNATURE_BYTES:
        raise MalformedMessage(f"a signature has {SIGNATURE_BYTES} bytes")
    roster.verify(presence.client_id, hello.to_sign(presence.client_id), presence.signature)
    return presence.client_id


_Kind = TypeVar("_Kind", Hello, Presence)


def _decode(encoded: bytes, kind: type[_Kind]) -> _Kind:
    if len(encoded) > _LARGEST:
        raise MalformedMessage(f"a {kind.__name__.lower()} is at most {_LARGEST} bytes; this is {len(encoded)}")
    try:
        message = msgspec.msgpack.decode(encoded, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a {kind.__name__.lower()}: {error}") from None
    if msgspec.msgpack.encode(message) != encoded:
        raise MalformedMessage(f"not the canonical encoding of a {kind.__name__.lower()}")
    return message
