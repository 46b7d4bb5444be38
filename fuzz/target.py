"""What a fuzz target is, and the property that every one of them has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpt_secure.crypto import CryptoError
from fedpt_secure.errors import FedptError

SECONDS_AN_INPUT = 1.0
MEGABYTES = 1024


class Finding(AssertionError):
    """An input that a target does not treat as it promises."""


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    Attributes:
        what: the decoder, for people.
        reencode: decodes an input and returns what the decoded value encodes to, which has to be the input. A target
            without an encoder of its own compares with a second implementation instead and returns its input.
        seeds: inputs to start from, most of them accepted.
        seeds_change: seeds are made by a generator without a seed, and are therefore not committed.
    """

    what: str
    reencode: Callable[[bytes], bytes]
    seeds: Callable[[], Sequence[bytes]]
    seeds_change: bool = False


def accepts(target: Target, data: bytes) -> bool:
    """Whether the target takes the input, as its canonical encoding, or refuses it with a typed error.

    Raises:
        Finding: what it decoded encodes to something else, or two implementations differ.
        Exception: anything but a `CryptoError` or a `FedptError` came out of the decoder.
    """
    try:
        again = target.reencode(data)
    except (CryptoError, FedptError):
        return False
    if again != data:
        raise Finding(f"accepted {len(data)} bytes that are not the canonical {len(again)}")
    return True
