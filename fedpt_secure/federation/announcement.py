"""What the server says at the start of a round, as bytes; decoded strictly by the client."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto.structs import resolved
from fedpt_secure.errors import RoundError

PROTOCOL = "fedpt-secure/round/2"
MAXIMUM_BYTES = 1 << 30


def agreed_digest(model_digest: bytes, config_digest: bytes) -> bytes:
    """What clients sign of a round: the model they train from, and the terms (settings, tiers, blocks) they do it on.

    Masks are derived from it too: those of clients with other terms do not cancel.
    """
    return hashlib.sha256(b"fedpt-secure/agreed/1" + model_digest + config_digest).digest()


@resolved
class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One round: who is in it, on which terms, from which global adapter.

    Attributes:
        run_id: 16 random bytes of the run.
        attempt: counts restarts of the server; a restarted round is a new protocol session.
        config_digest: SHA-256 of the run's configuration, which fixes every public constant of the training, and of
            who declared which tier.
        clip_norm: what gradients or updates are clipped to in this round.
        adapter: the global adapter, little-endian float32.
    """

    protocol: str
    run_id: bytes
    round_index: int
    attempt: int
    cohort: tuple[str, ...]
    threshold: int
    minimum_survivors: int
    ring_bits: int
    config_digest: bytes
    clip_norm: float
    adapter: bytes

    def to_bytes(self) -> bytes:
        """The wire form."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Announcement:
        """Decode and check the form; the client checks the content.

        Raises:
            RoundError: not an announcement of this protocol version.
        """
        if len(content) > MAXIMUM_BYTES:
            raise RoundError(f"announcement of {len(content)} bytes is larger than {MAXIMUM_BYTES}")
        try:
            announcement = msgspec.msgpack.decode(content, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RoundError(f"announcement cannot be read: {error}") from None
        if announcement.protocol != PROTOCOL:
            raise RoundError(f"server speaks {announcement.protocol!r}, this client {PROTOCOL!r}", hint="upgrade one")
        if len(announcement.adapter) % 4:
            raise RoundError(f"adapter of {len(announcement.adapter)} bytes is not a vector of float32")
        return announcement

    def adapter_vector(self) -> npt.NDArray[np.float32]:
        """The global adapter `[d]`."""
        return np.frombuffer(self.adapter, dtype="<f4").astype(np.float32)
