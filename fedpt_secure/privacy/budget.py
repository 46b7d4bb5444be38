"""What the owner of a data set allows to be spent on it, and what a release is charged against that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fedpt_secure.errors import PrivacyError, UnitNotCovered
from fedpt_secure.privacy.accounting import GaussianSteps, check_delta

Unit = Literal["record", "client"]
"""What a promise is about: one record of a client, or all that a client has."""
Mode = Literal["local", "distributed", "client"]
"""The mechanisms of docs/privacy.md."""
UNITS: dict[Mode, Unit] = {"local": "record", "distributed": "record", "client": "client"}

_LONGEST_NOTE = 200


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that everything done with one data set may cost together.

    Attributes:
        epsilon: above 0; infinity sets no limit.
        delta: at which epsilon is computed, whatever delta a run speaks of.
        unit: what the owner wants protected, add-or-remove one.
        set_at: when, in UTC, ISO 8601; filled in by the ledger.
        set_by: by whom or why, in the owner's words; may be empty.

    Raises:
        PrivacyError: a value that is no budget.
    """

    epsilon: float
    delta: float
    unit: Unit = "record"
    set_at: str = ""
    set_by: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.epsilon) or self.epsilon <= 0:
            raise PrivacyError(f"a budget of epsilon {self.epsilon} is not above 0", hint="inf sets no limit")
        check_delta(self.delta)
        if self.unit not in get_args(Unit):
            raise PrivacyError(f"a budget's unit is record or client, not {self.unit!r}")
        if len(self.set_by) > _LONGEST_NOTE or not self.set_by.isprintable():
            raise PrivacyError(
                f"a note of who set the budget is one printable line of at most {_LONGEST_NOTE} characters"
            )

    def allows_more_than(self, other: Budget) -> bool:
        """True if anything that `other` forbids is allowed here: a larger epsilon or delta, or a smaller unit."""
        return (
            self.epsilon > other.epsilon or self.delta > other.delta or (self.unit, other.unit) == ("record", "client")
        )


def charge(spent: GaussianSteps, mode: Mode, unit: Unit) -> GaussianSteps:
    """What a release of `mode` costs a budget of `unit`.

    A release whose unit is the whole client also protects each of its records, at half the noise: with a record more or
    less the client's clipped update stays in the sum but is another one, and two vectors of norm C are up to 2 C apart,
    where a client that comes or goes moves the sum by C. Sampling the client is then counted as amplifying nothing:
    the accountant's subsampled mechanism compares a unit with its absence, not with another unit.

    Raises:
        UnitNotCovered: a record-level release promises nothing for the client as a whole.
    """
    if UNITS[mode] == unit:
        return spent
    if unit == "client":
        raise UnitNotCovered(
            f"mode {mode} protects single records, and this client's budget is for everything it has",
            hint="--privacy client, or a budget with unit record: `fedpt-secure ledger set-budget`",
        )
    return replace(spent, noise_multiplier=spent.noise_multiplier / 2, sampling_rate=1.0)
