"""What the server asks of whatever computes: continuations that come and go, advanced together step by step.

`proxy.DecodingEngine` is the one that serves; tests put scripted ones in its place.
"""

from __future__ import annotations

from typing import Literal, Protocol

from fedpt_secure.proxy import Request, TokenEvent

Arm = Literal["proxied", "large", "small"]
"""Whose words: the steered large LM, the large LM alone, or the tuned small LM alone."""


class Engine(Protocol):
    """Requests are added, advance together, and are removed or end. Used by one thread at a time."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together, for every arm."""

    def add(self, request: Request) -> int:
        """Check and queue a request; its events carry the handle that is returned.

        Raises:
            FedptError: it cannot be done.
        """

    def remove(self, handle: int) -> None:
        """Forget a request; nothing happens if it has ended already."""

    def step(self) -> list[TokenEvent]:
        """The next tokens of some or all requests; a request whose event has an `ending` is over.

        Raises:
            FedptError: a model failed, and no request can go on.
        """

    def close(self) -> None:
        """End what the engine started."""
