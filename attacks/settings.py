"""What an audit is asked for, and how much time it may take."""

from __future__ import annotations

import math
import re
import time
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedpt_secure.config import Seed, Settings
from fedpt_secure.errors import ConfigError

Part = Literal["accounting", "membership", "canaries", "mechanism", "protocol", "server_view", "exposure", "shadows"]
PARTS: tuple[Part, ...] = (
    "accounting",
    "membership",
    "canaries",
    "mechanism",
    "protocol",
    "server_view",
    "exposure",
    "shadows",
)
"""In the order they run: what decides the verdict soonest comes first, what costs most last."""

_UNITS = {"s": 1, "m": 60, "h": 3600}


class AuditSettings(Settings):
    """One audit. Its result is a function of these, the run, and the draws of noise and thresholds."""

    claimed_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Hold the run to this epsilon instead of its own."""
    budget_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Sizes are chosen to end in about so long; nothing: full sizes."""
    shadows: Annotated[int, Field(ge=0, le=256)] = 0
    """Shadow models to train for the RMIA attack; at least 2, or 0 for none."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """False-alarm rate of every decisive statistical check; the verdict's is at most their sum."""
    seed: Seed = 0
    """Which records are looked at, and which half chooses thresholds; never the mechanism's noise."""
    parts: tuple[Part, ...] = PARTS
    fresh: bool = False
    """Forget what an earlier audit of this run found."""

    @field_validator("shadows")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one shadow model tells nothing about a record it was not trained on: 0, or 2 and more")
        return value


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `1.5h` or a bare number of seconds.

    Raises:
        ConfigError: it is none of them.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ConfigError(f"a time budget is a number with s, m or h behind it, not {text!r}", hint="--budget 10m")
    return seconds


class TimeBudget:
    """Chooses sizes so that the whole stays within a time, and writes down what that cost.

    Attributes:
        sizes: by name, `[chosen, wanted]`.
        cost_in_power: one sentence for every size that is not the full one.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.sizes: dict[str, list[int]] = {}
        self.cost_in_power: list[str] = []
        self._began = time.monotonic()

    @property
    def used(self) -> float:
        """Seconds since the audit began."""
        return time.monotonic() - self._began

    def fit(
        self, name: str, wanted: int, *, seconds_each: float, share: float, minimum: int = 0, consequence: str = ""
    ) -> int:
        """How many of `wanted` items fit into a share of the time.

        Args:
            share: of the whole budget, or of what is left if that is less.
            minimum: fewer make no sense; they are done whatever the budget.
            consequence: what fewer than wanted cost; `{count}` stands for how many there are.
        """
        count = wanted
        if self.seconds is not None:
            allowed = min(share * self.seconds, max(0.0, self.seconds - self.used))
            count = min(wanted, max(min(minimum, wanted), int(allowed / max(seconds_each, 1e-9))))
        self.sizes[name] = [count, wanted]
        if count < wanted:
            self.cost_in_power.append(f"{name}: {count} of {wanted}; {consequence.format(count=count)}".rstrip("; "))
        return count
