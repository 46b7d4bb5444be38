"""Message types that threads may decode at once from the start."""

from __future__ import annotations

from typing import TypeVar

import msgspec

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


def resolved(kind: type[_Struct]) -> type[_Struct]:
    """The same type, its fields looked up now, by the thread that imports it. For every `msgspec.Struct` here.

    msgspec (0.22) looks a type's fields up when it is first decoded, and keeps them on the class without a lock.
    Threads that decode a round's first messages at once then read what one of them is still writing, and the process
    dies of a segmentation fault (`tests/crypto/test_structs.py`). Once a decoder has been made, that is over.
    """
    msgspec.msgpack.Decoder(kind)
    return kind
