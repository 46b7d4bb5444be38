"""API keys: read once, kept as keyed hashes, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedpt_secure.errors import ConfigError

ENVIRONMENT = "FEDPT_API_KEYS"
SHORTEST_KEY = 16
_LONGEST_KEY = 512


class ApiKeys:
    """The keys that may use a server; none at all where it is empty.

    Guarantees: only BLAKE2b hashes under a key of this process are kept, so neither a memory dump's hashes nor a log
    of `digest`s can be compared with anything outside; the time a check takes depends neither on how much of a key is
    right nor on which one it is.

    Args:
        keys: distinct, printable ASCII without blanks, of at least `SHORTEST_KEY` characters.

    Raises:
        ConfigError: a key is none; the message tells its place, never its text.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._secret = secrets.token_bytes(32)
        digests = []
        for place, key in enumerate(keys, start=1):
            _check(key, place)
            digests.append(self._hash(key.encode()))
        self._digests = tuple(dict.fromkeys(digests))

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self)} keys)"

    def digest(self, presented: bytes) -> bytes | None:
        """The hash of a key that is one of ours, to count its requests by; None for any other."""
        candidate = self._hash(presented[: _LONGEST_KEY + 1])
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, candidate)
        return candidate if found else None

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Keys of a file (one a line, `#` starts a comment line) and of `FEDPT_API_KEYS` (commas between them).

    Raises:
        ConfigError: the file cannot be read, is open to other users, or holds no key; or a key is not acceptable.
    """
    keys = [key.strip() for key in environment.get(ENVIRONMENT, "").split(",") if key.strip()]
    if file is not None:
        keys += _lines(file)
    return ApiKeys(keys)


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(1 << 20).decode()
    except OSError as error:
        raise ConfigError(f"cannot read the API keys {str(file)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the API keys {str(file)!r} are not text", hint="one key a line") from None
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"other users may read or change the API keys in {str(file)!r} (mode {stat.S_IMODE(mode):o})",
            hint=f"chmod 600 {file}",
        )
    lines = [line.strip() for line in content.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{str(file)!r} holds no API key", hint="one key a line; `openssl rand -hex 24` makes one")
    return keys


def _check(key: str, place: int) -> None:
    if not SHORTEST_KEY <= len(key) <= _LONGEST_KEY or not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"API key number {place} is not acceptable: it must be {SHORTEST_KEY} to {_LONGEST_KEY} printable ASCII "
            "characters without blanks",
            hint="`openssl rand -hex 24` makes one",
        )
