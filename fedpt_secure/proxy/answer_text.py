"""The text of a continuation as it grows, and the stop string that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PARTIAL = "\ufffd"
"""What decoders put for bytes that are not (yet) a character."""


class AnswerText:
    """Text from ids, released as soon as it is certain.

    Guarantees: the released pieces join to the text of all ids, up to the first stop string, which is not part of it,
    however the text is cut into tokens. Bytes at the end that are no character are text, but never a stop string. A
    character that is spread over several tokens is released with the last of them; text that may be the beginning of a
    stop string is held back until it is decided.

    Args:
        decode: the text of some ids. The text of more ids must go on from it, but for replacement characters at its
            end; byte-level and byte-fallback tokenizers do.
        stops: not empty strings.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._ids: list[int] = []
        self._released = 0
        self._searched = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; often its own, sometimes none. Sets `stopped` at a stop string."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        return self._release(whole, len(whole.rstrip(_PARTIAL)), hold=True)

    def finish(self) -> str:
        """What was held back, when the continuation ends for another reason than a stop string."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        piece = self._release(whole, len(whole.rstrip(_PARTIAL)), hold=False)
        rest, self._released = whole[self._released :], len(whole)
        return piece + rest

    def _release(self, whole: str, certain: int, *, hold: bool) -> str:
        begin = max(0, self._searched - self._longest + 1)
        found = [place for stop in self._stops if (place := whole.find(stop, begin, certain)) >= 0]
        self._searched = certain
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = certain - (self._undecided(whole[:certain]) if hold else 0)
        piece = whole[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _undecided(self, text: str) -> int:
        """Length of the longest ending of the text that is a proper beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            ending = text[-length:]
            if any(len(stop) > length and stop.startswith(ending) for stop in self._stops):
                return length
        return 0
