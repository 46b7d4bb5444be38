"""Who takes part: long-term Ed25519 identities, and the roster that pins them out of band.

The roster is the public-key infrastructure of the protocol. Every client holds a copy that it did not get
from the aggregation server, and every session is bound to its digest, so that a server can neither invent a
client nor swap one's keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from fedpt_secure.crypto import strict_files
from fedpt_secure.crypto.errors import ParameterError, SignatureInvalid
from fedpt_secure.crypto.labels import Label, digest
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes
from fedpt_secure.crypto.structs import resolved

LONGEST_CLIENT_ID_BYTES: Final = 128
LARGEST_ROSTER: Final = 1 << 16
SIGNATURE_BYTES: Final = 64
VERIFY_KEY_BYTES: Final = 32

_ROSTER_FORMAT: Final = "fedpt-secure roster v1"
_LARGEST_ROSTER_FILE: Final = 64 << 20


def check_client_id(client_id: str) -> None:
    """Accept 1 to 128 bytes of UTF-8 without control characters.

    Raises:
        ParameterError: the id is something else.
    """
    try:
        encoded = client_id.encode()
    except UnicodeEncodeError:
        raise ParameterError(f"client id {client_id!r} is not valid Unicode") from None
    if not 1 <= len(encoded) <= LONGEST_CLIENT_ID_BYTES or not client_id.isprintable():
        raise ParameterError(
            f"client id {client_id[:40]!r} is not 1 to {LONGEST_CLIENT_ID_BYTES} bytes of printable UTF-8"
        )


class Identity:
    """A client's long-term signing key. It signs; it never encrypts and never derives a mask.

    PyNaCl keeps the key in immutable `bytes`: it cannot be wiped, and lives as long as the object.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise ParameterError(f"an identity is made from a 32-byte seed, not {len(seed)} bytes")
        self._signing_key = SigningKey(seed)

    @classmethod
    def generate(cls, random_bytes: RandomBytes = SYSTEM_RANDOM) -> Identity:
        """A fresh identity."""
        return cls(random_bytes(32))

    @property
    def verify_key_bytes(self) -> bytes:
        """The public Ed25519 key, 32 bytes, as it stands in a roster."""
        return bytes(self._signing_key.verify_key)

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature (RFC 8032) of `message`, 64 bytes."""
        return self._signing_key.sign(message).signature

    def __repr__(self) -> str:
        return f"Identity(verify_key={self.verify_key_bytes.hex()})"


class Roster(Mapping[str, bytes]):
    """Client ids and their public Ed25519 keys: immutable, sorted by id, one key per id and one id per key.

    Args:
        verify_keys: 32 bytes for each client id.
        remembered: valid signatures that `verify` remembers and does not verify again, the last used ones. For many
            clients in one process, who share a roster and each verify the signatures of all others. What is remembered
            is public, and has to be the same in every byte of key, message and signature; refusals are not remembered.

    Raises:
        ParameterError: an id or key is not valid, or a key appears twice (one person under two names).
    """

    def __init__(self, verify_keys: Mapping[str, bytes], *, remembered: int = 0) -> None:
        if not 1 <= len(verify_keys) <= LARGEST_ROSTER:
            raise ParameterError(f"a roster names 1 to {LARGEST_ROSTER} clients, not {len(verify_keys)}")
        owner: dict[bytes, str] = {}
        for client_id in sorted(verify_keys):
            check_client_id(client_id)
            key = bytes(verify_keys[client_id])
            if len(key) != VERIFY_KEY_BYTES or not crypto_core_ed25519_is_valid_point(key):
                raise ParameterError(f"the key of client {client_id!r} is no valid Ed25519 public key")
            if key in owner:
                raise ParameterError(f"clients {owner[key]!r} and {client_id!r} have the same key")
            owner[key] = client_id
        self._keys = {client_id: key for key, client_id in owner.items()}
        parts = [part for client_id, key in self._keys.items() for part in (client_id.encode(), key)]
        self._digest = digest(Label.ROSTER, parts)
        self._require_signed = lru_cache(maxsize=remembered)(_require_signed) if remembered else _require_signed

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the whole roster; part of every session."""
        return self._digest

    @property
    def spoken_digest(self) -> str:
        """`digest` for people to compare over the telephone: four lines of four groups of four hexadecimal digits.

        All of it has to be compared: whoever makes the roster can search for two that agree in part.
        """
        text = self._digest.hex()
        groups = [text[start : start + 4] for start in range(0, len(text), 4)]
        return "\n".join(" ".join(groups[start : start + 4]) for start in range(0, len(groups), 4))

    def check_digest(self, expected: str) -> None:
        """Accept a roster whose digest is `expected`: hexadecimal, in any case, with any white space.

        Raises:
            ParameterError: it is another one, or `expected` is not the whole of a digest.
        """
        text = "".join(expected.split()).lower()
        if len(text) != 2 * len(self._digest) or not set(text) <= set("0123456789abcdef"):
            raise ParameterError(
                f"a roster digest is {2 * len(self._digest)} hexadecimal digits; {len(text)} characters were given",
                hint="compare all of it: part of a digest can be forged",
            )
        if text != self._digest.hex():
            raise ParameterError(
                f"the roster's digest is {self._digest.hex()}, not {text}",
                hint="this is another roster than the one the digest was read from: do not use it",
            )

    def __getitem__(self, client_id: str) -> bytes:
        return self._keys[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Roster({len(self)} clients, digest={self._digest.hex()[:16]}...)"

    def verify(self, client_id: str, message: bytes, signature: bytes) -> None:
        """Check that `client_id` signed `message`.

        Raises:
            SignatureInvalid: it did not, or the roster does not name it.
        """
        key = self._keys.get(client_id)
        if key is None:
            raise SignatureInvalid(f"client {client_id!r} is not in the roster")
        try:
            self._require_signed(key, message, signature)
        except (BadSignatureError, ValueError):
            raise SignatureInvalid(f"the signature is not one of client {client_id!r} on this message") from None

    def to_json(self) -> bytes:
        """The canonical file content: sorted ids, two-space indent, keys in lower-case hexadecimal, a final newline."""
        entries = [_RosterEntry(id=client_id, verify_key=key.hex()) for client_id, key in self._keys.items()]
        return strict_files.to_json(_RosterFile(format=_ROSTER_FORMAT, clients=entries))

    @classmethod
    def from_json(cls, content: bytes) -> Roster:
        """The roster in a file's content, which has to be the bytes of `to_json`.

        Raises:
            ParameterError: it is something else: too large, another format or version, unknown fields, repeated ids or
                keys, an order or a spelling of its own.
        """
        file = strict_files.from_json(content, {_ROSTER_FORMAT: _RosterFile}, largest=_LARGEST_ROSTER_FILE)
        keys = {
            entry.id: strict_files.from_hex(entry.verify_key, "verify_key", size=VERIFY_KEY_BYTES)
            for entry in file.clients
        }
        if len(keys) != len(file.clients):
            raise ParameterError("a client id appears twice in the roster")
        roster = cls(keys)
        if list(roster) != [entry.id for entry in file.clients]:
            raise ParameterError("the clients of a roster file are not sorted by id")
        return roster

    def save(self, path: Path) -> None:
        """Write `to_json` to a new file; an existing roster is never replaced silently."""
        strict_files.write_new(path, self.to_json(), mode=0o644)

    @classmethod
    def load(cls, path: Path) -> Roster:
        """`from_json` of a file.

        Raises:
            ParameterError: the file is no roster.
            OSError: the file cannot be read.
        """
        return cls.from_json(strict_files.read_file(path, largest=_LARGEST_ROSTER_FILE))


def _require_signed(key: bytes, message: bytes, signature: bytes) -> None:
    VerifyKey(key).verify(message, signature)


@resolved
class _RosterEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    verify_key: str


@resolved
class _RosterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    clients: list[_RosterEntry]
