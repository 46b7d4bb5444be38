"""From continuations to answers: text as it becomes certain, why it ended, what it cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from fedpt_secure.proxy import TokenEvent
from fedpt_secure.serving.scheduler import Continuation
from fedpt_secure.serving.token_text import StopScanner, TokenText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one answer grew by.

    Attributes:
        index: which answer of the request.
        text: new text, none of it part of a stop string.
        choices: the tokens behind it.
        finish_reason: given once, with the last delta.
        generated: tokens computed for this answer so far, its end token included.
    """

    index: int
    text: str
    choices: tuple[TokenEvent, ...]
    finish_reason: FinishReason | None
    generated: int


async def growing(
    index: int, continuation: Continuation, token_text: TokenText, stops: Sequence[str]
) -> AsyncGenerator[Delta, None]:
    """One answer, a delta for each token whose text is certain. Cancels the continuation however it is left.

    Raises:
        FedptError: the engine could not go on.
    """
    text = token_text.growing()
    scanner = StopScanner(stops)
    generated = 0
    try:
        async for choice in continuation:
            generated += 1
            if choice.ending == "end":
                rest = scanner.rest(text.rest())
                yield Delta(index, rest.text, rest.choices, "stop", generated)
                return
            piece = scanner.add(text.add(choice.token), choice)
            if scanner.stopped:
                yield Delta(index, piece.text, piece.choices, "stop", generated)
                return
            if choice.ending == "length":
                rest = scanner.rest(text.rest())
                yield Delta(index, piece.text + rest.text, piece.choices + rest.choices, "length", generated)
                return
            if piece.text or piece.choices:
                yield Delta(index, piece.text, piece.choices, None, generated)
    finally:
        continuation.cancel()


async def interleaved(
    continuations: Sequence[Continuation],
    token_text: TokenText,
    stops: Sequence[str],
    *,
    on_first: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Delta, None]:
    """All answers of a request, deltas in the order in which they come. Cancels all of them however it is left.

    Raises:
        FedptError: the engine could not go on with one of them.
    """
    arrived: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    async def read(index: int, continuation: Continuation) -> None:
        try:
            async with aclosing(growing(index, continuation, token_text, stops)) as deltas:
                async for delta in deltas:
                    arrived.put_nowait(delta)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    readers = [asyncio.create_task(read(*item)) for item in enumerate(continuations)]
    left = len(readers)
    first = True
    try:
        while left:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
                continue
            if first:
                on_first()
                first = False
            yield item
    finally:
        for reader in readers:
            reader.cancel()
        for continuation in continuations:
            continuation.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
