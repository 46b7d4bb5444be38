"""Requests and replies as Flower messages: one `ConfigRecord` with one field of bytes each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpt_secure.errors import RoundError
from fedpt_secure.network.transport import HELLO, LARGEST_BODY, SETTLE

if TYPE_CHECKING:
    from flwr.app import RecordDict

MESSAGE_TYPES: Mapping[str, str] = {
    HELLO: "query.hello",
    "advertise": "query.advertise",
    "share_keys": "query.share_keys",
    "mask": "train.mask",
    "confirm": "query.confirm",
    "unmask": "query.unmask",
    SETTLE: "query.settle",
}
"""Phase -> Flower's message type."""
REQUEST = "request"
REPLY = "reply"
_RECORD = "fedpt"
LARGEST_MESSAGE = LARGEST_BODY + 4096


def pack(field: str, content: bytes) -> RecordDict:
    """The content of a Flower message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({_RECORD: ConfigRecord({field: content})})


def unpack(content: object, field: str) -> bytes:
    """The bytes in a Flower message's content.

    Raises:
        RoundError: it is of another form.
    """
    from flwr.app import ConfigRecord, RecordDict

    if not isinstance(content, RecordDict) or list(content) != [_RECORD]:
        raise RoundError("a Flower message holds other records than one of ours")
    record = content[_RECORD]
    if not isinstance(record, ConfigRecord) or list(record) != [field]:
        raise RoundError(f"a Flower message holds something else than one {field}")
    value = record[field]
    if not isinstance(value, bytes) or len(value) > LARGEST_MESSAGE:
        raise RoundError(f"a Flower message's {field} is no bytes, or too many")
    return value
