"""A round seen from outside, the same in every engine: its phases, and who said how much and fell silent where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PHASES = ("advertise", "share_keys", "mask", "confirm", "unmask")


@dataclass(slots=True)
class Transcript:
    """What a round looked like from outside: sizes, times, who fell silent where. No content, no secrets.

    Attributes:
        bytes_up, bytes_down: by client, summed over the round's phases.
        seconds: by phase, all clients together; `mask` holds their training.
        dropped: client -> the phase it did not answer, and why.
        declined: client -> one word of reason, of those dropped clients that gave one: `budget` (its owner's budget
            would be passed), `unit` (its owner's budget is for the whole client).
        rejected: messages the server refused.
        aborted: why the round ended without a sum; empty where it completed.
    """

    round_index: int
    cohort: tuple[str, ...]
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)
    survivors: tuple[str, ...] = ()
    aborted: str = ""

    def count_down(self, client_id: str, message: bytes) -> None:
        """A message to a client."""
        self.bytes_down[client_id] = self.bytes_down.get(client_id, 0) + len(message)

    def count_up(self, client_id: str, message: bytes) -> None:
        """A message from a client."""
        self.bytes_up[client_id] = self.bytes_up.get(client_id, 0) + len(message)

    def abort(self, why: str) -> None:
        """The round ended without a sum; how many clients declined, and for what, is said with the reason."""
        self.aborted = why
        if self.declined:
            reasons = ", ".join(f"{count} for {code}" for code, count in Counter(self.declined.values()).items())
            self.aborted += f"; of {len(self.cohort)} clients {len(self.declined)} declined: {reasons}"
