"""Every error a user can meet.

    FedptError                        exit code 1
    ├── ConfigError                   2   a setting is not acceptable
    ├── DataError                     4   text that cannot be read, split or used
    │   └── FetchError                4   an artefact could not be fetched or does not match its pinned hash
    ├── ModelError                    5   weights or tokenizer missing, corrupt or incompatible
    ├── PrivacyError                  6   the privacy asked for cannot be given
    │   ├── BudgetExceeded            6   a client's own budget would be passed
    │   │   └── UnitNotCovered        6   a client's budget is for more than the work asked for protects
    │   ├── AlreadyReleased           6   a client has already given its update to this round
    │   └── LedgerError               6   a client's ledger is missing, damaged, or cannot be written
    ├── RoundError                    7   secure aggregation stopped; nothing was revealed
    ├── RunDirectoryError             8   a run directory is missing, damaged or of another configuration
    ├── BlackBoxError                 9   the large model's API misbehaved or cannot do what is asked
    └── IdentityError                 11  an identity or a roster is not acceptable, or not the one expected

Exit code 3 is kept for audits that find a violation. The protocol's own errors live in `fedpt_secure.crypto` and are
turned into `RoundError` where a round ends.
"""

from __future__ import annotations


class FedptError(Exception):
    """An error with what was given, the rule it broke, and what to do about it.

    Attributes:
        message: one line, what was given and the rule.
        hint: one line, a way out; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(FedptError):
    """A setting is not acceptable."""

    exit_code = 2


class DataError(FedptError):
    """Text cannot be read, split or used."""

    exit_code = 4


class FetchError(DataError):
    """An artefact could not be fetched, or what came does not match its pinned hash."""


class ModelError(FedptError):
    """Weights or tokenizer are missing, corrupt, or do not fit together."""

    exit_code = 5


class PrivacyError(FedptError):
    """The privacy asked for cannot be given; nothing was trained."""

    exit_code = 6


class BudgetExceeded(PrivacyError):
    """Work would pass a client's own budget; the client declines.

    Attributes:
        decline_code: the one word of the reason that leaves the client. The message names what was spent, which tells
            of other runs and servers, and stays with the owner.
    """

    decline_code = "budget"


class UnitNotCovered(BudgetExceeded):
    """A client's budget is for everything it has, and the work asked for protects single records."""

    decline_code = "unit"


class AlreadyReleased(PrivacyError):
    """A client has already given its update to this round, or opened it; it does not do so again."""


class LedgerError(PrivacyError):
    """A client's ledger is missing, damaged, or cannot be written; without it a client does not take part."""


class RoundError(FedptError):
    """Secure aggregation stopped before a sum was revealed."""

    exit_code = 7


class RunDirectoryError(FedptError):
    """A run directory is missing, damaged, or belongs to another configuration."""

    exit_code = 8


class BlackBoxError(FedptError):
    """The large model's API misbehaved, or cannot do what is asked of it."""

    exit_code = 9


class IdentityError(FedptError):
    """An identity or a roster is not acceptable, or is not the one expected."""

    exit_code = 11
