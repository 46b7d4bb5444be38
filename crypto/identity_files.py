"""An identity on disk: a secret file that stays with its owner, and a public one to hand out for the roster."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from fedpt_secure.crypto.errors import ParameterError
from fedpt_secure.crypto.identities import VERIFY_KEY_BYTES, Identity, Roster, check_client_id
from fedpt_secure.crypto.passphrases import SALT_BYTES, SEAL_BYTES, open_with_passphrase, seal_with_passphrase
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes
from fedpt_secure.crypto.strict_files import from_hex, from_json, read_file, to_json, write_new
from fedpt_secure.crypto.structs import resolved

_PUBLIC_FORMAT: Final = "fedpt-secure public identity v1"
_SECRET_FORMAT: Final = "fedpt-secure secret identity v1"  # noqa: S105 - the name of a format
_SEALED_FORMAT: Final = "fedpt-secure sealed identity v1"
_LARGEST_FILE: Final = 4096
_SEED_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What a client hands out: its id and its public Ed25519 key.

    Raises:
        ParameterError: the id or the key is not one that a `Roster` accepts.
    """

    client_id: str
    verify_key: bytes

    def __post_init__(self) -> None:
        Roster({self.client_id: self.verify_key})

    def to_json(self) -> bytes:
        """The file's only accepted content."""
        return to_json(_PublicFile(format=_PUBLIC_FORMAT, id=self.client_id, verify_key=self.verify_key.hex()))

    @classmethod
    def from_json(cls, content: bytes) -> PublicIdentity:
        """What `to_json` made.

        Raises:
            ParameterError: the content is something else.
        """
        file = from_json(content, {_PUBLIC_FORMAT: _PublicFile}, largest=_LARGEST_FILE)
        return cls(file.id, from_hex(file.verify_key, "verify_key", size=VERIFY_KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> PublicIdentity:
        """`from_json` of a file.

        Raises:
            ParameterError: the file is no public identity.
            OSError: the file cannot be read.
        """
        return cls.from_json(read_file(path, largest=_LARGEST_FILE))


@dataclass(frozen=True, slots=True)
class OwnIdentity:
    """A client's own name and signing key, as loaded from its secret file."""

    client_id: str
    identity: Identity

    def check_roster(self, roster: Roster) -> None:
        """Accept a roster that names this client with this key.

        Raises:
            ParameterError: the roster lacks the client, or has another key for it.
        """
        listed = roster.get(self.client_id)
        if listed is None:
            names = [name for name, key in roster.items() if key == self.identity.verify_key_bytes]
            raise ParameterError(
                f"the roster does not name client {self.client_id!r}"
                + (f"; it has its key under {names[0]!r}" if names else ""),
                hint="send the public file to whoever makes the roster, and use the roster that names it",
            )
        if listed != self.identity.verify_key_bytes:
            raise ParameterError(
                f"the roster has another key for client {self.client_id!r} than this identity's",
                hint="somebody else's key, or one that was replaced: do not take part before that is cleared up",
            )


class StoredIdentity:
    """The content of a secret file, checked but not opened. It shows nothing but its public half.

    Raises:
        ParameterError: a field does not have the form it should.
    """

    def __init__(self, file: _SecretFile | _SealedFile) -> None:
        self._file = file
        self.public = PublicIdentity(file.id, from_hex(file.verify_key, "verify_key", size=VERIFY_KEY_BYTES))
        if isinstance(file, _SealedFile):
            from_hex(file.salt, "salt", size=SALT_BYTES)
            from_hex(file.sealed_seed, "sealed_seed", size=_SEED_BYTES + SEAL_BYTES)
        else:
            from_hex(file.seed, "seed", size=_SEED_BYTES)

    @classmethod
    def make(
        cls, client_id: str, *, passphrase: str | None, random_bytes: RandomBytes = SYSTEM_RANDOM
    ) -> StoredIdentity:
        """A fresh identity; None for a passphrase leaves its protection to the file's mode and the disk's encryption.

        Raises:
            ParameterError: the id or the passphrase is not acceptable.
        """
        check_client_id(client_id)
        seed = random_bytes(_SEED_BYTES)
        verify_key = Identity(seed).verify_key_bytes.hex()
        if passphrase is None:
            return cls(_SecretFile(format=_SECRET_FORMAT, id=client_id, verify_key=verify_key, seed=seed.hex()))
        salt = random_bytes(SALT_BYTES)
        bare = _SealedFile(format=_SEALED_FORMAT, id=client_id, verify_key=verify_key, salt=salt.hex(), sealed_seed="")
        sealed = seal_with_passphrase(seed, passphrase, salt=salt, data=to_json(bare))
        return cls(msgspec.structs.replace(bare, sealed_seed=sealed.hex()))

    def to_json(self) -> bytes:
        """The file's only accepted content. It holds the secret."""
        return to_json(self._file)

    @classmethod
    def from_json(cls, content: bytes) -> StoredIdentity:
        """What `to_json` made.

        Raises:
            ParameterError: the content is something else.
        """
        kinds: dict[str, type[_SecretFile] | type[_SealedFile]] = {
            _SECRET_FORMAT: _SecretFile,
            _SEALED_FORMAT: _SealedFile,
        }
        return cls(from_json(content, kinds, largest=_LARGEST_FILE))

    @property
    def is_sealed(self) -> bool:
        """Whether `open` asks for a passphrase."""
        return isinstance(self._file, _SealedFile)

    def open(self, ask_passphrase: Callable[[], str]) -> OwnIdentity:
        """The identity itself. All fields of a sealed file are authenticated.

        Raises:
            ParameterError: the passphrase is wrong, or the file was altered.
        """
        file = self._file
        if isinstance(file, _SealedFile):
            data = to_json(msgspec.structs.replace(file, sealed_seed=""))
            sealed, salt = bytes.fromhex(file.sealed_seed), bytes.fromhex(file.salt)
            identity = Identity(open_with_passphrase(sealed, ask_passphrase(), salt=salt, data=data))
        else:
            identity = Identity(bytes.fromhex(file.seed))
        if identity.verify_key_bytes != self.public.verify_key:
            raise ParameterError("the public key does not belong to the secret one; the file is damaged")
        return OwnIdentity(self.public.client_id, identity)

    def __repr__(self) -> str:
        return f"StoredIdentity({self.public!r}, is_sealed={self.is_sealed})"


@dataclass(frozen=True, slots=True)
class NewIdentity:
    """Where `create_identity` wrote what."""

    public: PublicIdentity
    secret_path: Path
    public_path: Path


def create_identity(
    client_id: str,
    directory: Path,
    *,
    ask_passphrase: Callable[[], str] | None,
    random_bytes: RandomBytes = SYSTEM_RANDOM,
) -> NewIdentity:
    """Make an identity and write `NAME.secret.json` and `NAME.public.json`, where NAME is the id made safe for a file.

    Guarantees: the secret file is its owner's only from its first byte on; each file is whole or absent, also after a
    power cut; nothing is replaced. A directory that is not there is made for its owner only; another keeps its mode.

    Args:
        ask_passphrase: called once, when nothing else stands in the way, for what seals the secret key; None leaves it
            bare (`StoredIdentity.make`).

    Raises:
        ParameterError: the id or the passphrase is not acceptable; nothing was written.
        FileExistsError: one of the files exists; nothing was written.
        OSError: a file cannot be written.
    """
    check_client_id(client_id)
    name = re.sub(r"^\.|[^A-Za-z0-9._-]", "_", client_id)[:64]
    secret_path, public_path = directory / f"{name}.secret.json", directory / f"{name}.public.json"
    for path in (secret_path, public_path):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "the file exists and is never replaced", str(path))
    passphrase = None if ask_passphrase is None else ask_passphrase()
    stored = StoredIdentity.make(client_id, passphrase=passphrase, random_bytes=random_bytes)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_new(secret_path, stored.to_json(), mode=0o600)
    try:
        write_new(public_path, stored.public.to_json(), mode=0o644)
    except BaseException:
        secret_path.unlink()
        raise
    return NewIdentity(stored.public, secret_path, public_path)


def load_identity(path: Path, *, ask_passphrase: Callable[[], str]) -> OwnIdentity:
    """The identity in a secret file.

    Args:
        ask_passphrase: called once, if the file is sealed.

    Raises:
        ParameterError: the file is no secret identity, is open to other users or damaged, or the passphrase is wrong.
        OSError: the file cannot be read.
    """
    return StoredIdentity.from_json(read_file(path, largest=_LARGEST_FILE, secret=True)).open(ask_passphrase)


def roster_of(clients: Iterable[PublicIdentity]) -> Roster:
    """The roster of these clients.

    Raises:
        ParameterError: two have one id or one key, or there are none or too many.
    """
    keys: dict[str, bytes] = {}
    for client in clients:
        if client.client_id in keys:
            raise ParameterError(
                f"two public identities are called {client.client_id!r}",
                hint="ask both owners which key is theirs; one of them makes a new identity under another id",
            )
        keys[client.client_id] = client.verify_key
    return Roster(keys)


@resolved
class _PublicFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    id: str
    verify_key: str


@resolved
class _SecretFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    id: str
    verify_key: str
    seed: str

    def __repr__(self) -> str:
        return f"_SecretFile(id={self.id!r})"


@resolved
class _SealedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    id: str
    verify_key: str
    salt: str
    sealed_seed: str
