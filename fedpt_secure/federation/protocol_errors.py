"""The seam between the protocol's error tree and the package's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedpt_secure.crypto import CryptoError
from fedpt_secure.errors import RoundError


@contextmanager
def as_round_error(where: str = "") -> Iterator[None]:
    """Raise the protocol's errors as `RoundError`, with `where` (a client, a phase) before the message."""
    try:
        yield
    except CryptoError as error:
        raise RoundError(f"{where}: {error.message}" if where else error.message, hint=error.hint) from error
