"""A client's SuperNode, which asks for messages more often while a round goes on.

Stock SuperNode asks every three seconds, and a round has seven messages.
"""

from __future__ import annotations

import sys
import time

_LONG = 3.0
"""What the SuperNode sleeps where there was no message."""
_BUSY_SECONDS = 0.4
_BUSY_FOR_SECONDS = 30.0
_WAITING_SECONDS = 0.1
"""Between looks for the reply of its own app."""


class Clock:
    """`time` as the SuperNode's main loop uses it: sleeps, shorter within half a minute of the last message."""

    def __init__(self) -> None:
        self._busy = -_BUSY_FOR_SECONDS

    def sleep(self, seconds: float) -> None:
        """Sleep no longer than asked for."""
        if seconds < _LONG:
            self._busy = time.monotonic()
            time.sleep(min(seconds, _WAITING_SECONDS))
        else:
            time.sleep(_BUSY_SECONDS if time.monotonic() - self._busy < _BUSY_FOR_SECONDS else seconds)


def main() -> None:
    """`python -m fedpt_secure.flower.supernode`, with the arguments of `flower-supernode`."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from fedpt_secure.flower.compatibility import require_compatible

    require_compatible()
    start_client_internal.time = Clock()  # type: ignore[attr-defined, assignment]
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
