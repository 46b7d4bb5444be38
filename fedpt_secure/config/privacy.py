"""What is promised, and which mechanism keeps it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedpt_secure.config.settings import Positive, Settings
from fedpt_secure.errors import PrivacyError

SMALLEST_DELTA = 1e-12
"""The accountant truncates probability mass near 1e-15, so that it cannot tell much smaller deltas apart."""


class PrivacyConfig(Settings):
    """What is promised, and the mechanism's public constants."""

    mode: Literal["local", "distributed", "client"] = "local"
    """`local`: a record is protected, and each client's own noise suffices (no trust in anybody). `distributed`: a
    record is protected, by the noise of all honest survivors together. `client`: so is a whole client."""
    epsilon: Annotated[float, Field(gt=0)] = 4.0
    """The promise over the whole run, for a record, or in mode `client` for a client; `inf` trains without privacy."""
    budget_epsilon: Annotated[float, Field(gt=0)] | None = None
    """What a simulated client's owner allows over all runs, where it has no ledger yet; default: `epsilon`. A ledger
    that is there keeps its own budget."""
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    """Chance with which the promise may fail; at least `SMALLEST_DELTA`."""
    clip_norm: Positive = 0.1
    """L2 norm each record's gradient, or in mode `client` the whole update, is clipped to."""
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Public probability with which a client's record takes part in a step (Poisson sampling); 1 takes all, which
    gives small clients the most signal for their noise (docs/privacy.md). In mode `client`: with which a client of the
    cohort contributes to a round, by a coin that only it sees."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Modes `distributed` and `client`: share of a cohort that may collude with the server; their noise is not counted
    on."""
    clipping: Literal["fixed", "quantile"] = "fixed"
    """`quantile`: the clip norm follows a private quantile of the units' norms (modes `distributed` and `client`)."""
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clip_learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    """Of the geometric update of an adaptive clip norm."""

    @model_validator(mode="after")
    def _sums_carry_the_count(self) -> PrivacyConfig:
        if self.mode == "local" and self.clipping != "fixed":
            raise ValueError(
                "clipping quantile needs a secure sum of noised counts: mode distributed or client, not local"
            )
        return self

    @field_validator("epsilon", "budget_epsilon")
    @classmethod
    def _not_nan(cls, value: float | None) -> float | None:
        if value is not None and math.isnan(value):
            raise ValueError("epsilon must be a number above 0, or inf for no privacy")
        return value

    @field_validator("delta")
    @classmethod
    def _accountable(cls, value: float) -> float:
        if value < SMALLEST_DELTA:
            raise ValueError(
                f"delta must be at least {SMALLEST_DELTA:g}, below which the accountant is not exact enough"
            )
        return value


def require_compatible(aggregator: str, privacy_mode: str) -> None:
    """Accept a way to sum updates and a privacy mode whose proof holds with it.

    Under CKKS only `local` is: each client's update carries its own noise before it is encrypted, so that whatever
    happens to it is post-processing. The noise of the other modes exists in the exact sum in the ring only, and their
    proofs need that nobody, no client either, sees anything but that sum.

    Raises:
        PrivacyError: the proof does not hold.
    """
    if aggregator != "masks" and privacy_mode != "local":
        raise PrivacyError(
            f"privacy mode {privacy_mode!r} cannot go with aggregator {aggregator!r}: its noise is only in exact sums "
            "whose parts nobody sees",
            hint="--privacy local, or --aggregator masks",
        )
