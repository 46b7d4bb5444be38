"""Rounds and cohorts, what clients can train, and the optimisation on both sides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedpt_secure.config.settings import Count, Fraction, Positive, Settings
from fedpt_secure.crypto import default_threshold
from fedpt_secure.errors import ConfigError

ClassesBy = Literal["frequency", "record"]
SMALLEST_COHORT = 8
"""Clients that a default round sums at least, where there are so many."""


class Tier(Settings):
    """What a client with few resources declares when it joins: never chosen from its data, and public."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    share: Annotated[float, Field(gt=0, le=1)]
    """Of the clients (simulation); the shares of all tiers add up to 1."""
    memory_mb: Count | None = None
    """What training may take beyond the program itself; a run that would take more is refused before it starts."""
    rank: Count | None = None
    """Columns of every B that it trains, the first ones; default: all of `lora.rank`."""
    layers: Count | None = None
    """It trains only the last this many of the layers that have an adapter; default: all of them."""


class FederationConfig(Settings):
    """Rounds, cohorts, and the failures that are simulated."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 8
    cohort: Annotated[int, Field(ge=3, le=100_000)] | None = None
    """Clients per round; default: so many that everybody takes part once, but no fewer than `SMALLEST_COHORT`."""
    minimum_survivors: Annotated[int, Field(ge=2)] | None = None
    """A round with fewer survivors is aborted; default: the secret-sharing threshold, 2/3 of the cohort."""
    dropout: Fraction = 0.0
    """Chance that a client vanishes in a round, at a random phase (simulation)."""
    ledgers: Annotated[str, Field(min_length=1)] | None = None
    """Directory where the simulated clients' ledgers outlive the run, so that a second run on the same data spends from
    the same budgets; default: inside the run directory. Made absolute, so that no later run misses it."""
    aggregator: Literal["masks", "ckks"] = "masks"
    """How updates are summed: under pairwise masks, or under CKKS, where one colluding client breaks the privacy of all
    (docs/ckks.md)."""
    ring_bits: Annotated[int, Field(ge=16, le=32)] = 32
    """Bits of a ring element; at most 32 in mode `local`: a client adds its noise before the encoding, and the grid of
    a 64-bit ring is finer than the noise's own, so that rounding would no longer hide the floats behind it."""

    tiers: Annotated[tuple[Tier, ...], Field(strict=False)] = ()
    """Kinds of clients by what they can train; none: all train the whole adapter (docs/constrained_clients.md)."""

    @field_validator("tiers")
    @classmethod
    def _cover_everybody(cls, value: tuple[Tier, ...]) -> tuple[Tier, ...]:
        if value and abs(sum(tier.share for tier in value) - 1) > 1e-9:
            raise ValueError(f"the tiers' shares add up to {sum(tier.share for tier in value):g}, must be 1")
        if len({tier.name for tier in value}) < len(value):
            raise ValueError("two tiers have the same name")
        return value

    @field_validator("ledgers")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @property
    def agreed_cohort(self) -> int:
        """Clients per round, once it is settled (`RunConfig.for_population`).

        Raises:
            ConfigError: it is not settled yet.
        """
        if self.cohort is None:
            raise ConfigError("the cohort's size is not settled before the number of clients is known")
        return self.cohort

    @property
    def agreed_survivors(self) -> int:
        """Fewest survivors of a round whose sum is opened."""
        return self.minimum_survivors or default_threshold(self.agreed_cohort)


class TrainingConfig(Settings):
    """The optimisation, on both sides. None of it changes the privacy."""

    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """DP-SGD steps a client makes per round."""
    local_learning_rate: Positive = 1.0
    normaliser: Positive = 16.0
    """Public constant that sums of gradients are divided by, whatever the client's record count."""
    layers_per_round: Count | None = None
    """Rounds train the adapted layers in blocks of this many, in turn from the top, and differentiate nothing below the
    block; default: every round trains all."""
    sampled_positions: Count | None = None
    """Most loss tokens of a record that a step looks at, chosen by the client, anew in each; default: all of them."""
    output_classes: Annotated[int, Field(ge=2)] | None = None
    """Classes that a step's softmax is over, beside each token's own: some that are chosen, the rest a sample, drawn by
    the client anew in each step (docs/dp_training.md); default: the whole head."""
    output_classes_by: ClassesBy = "frequency"
    """What chooses: `frequency`, half of them, by public text; `record`, two thirds, those that the small LM thinks
    likeliest in that record before any training, for adapters of the last layer's `down_proj` alone."""
    server_optimizer: Literal["average", "momentum", "adam"] = "adam"
    """What the server makes of the mean update (post-processing): FedAvg, FedAvgM or FedAdam (Reddi et al. 2021)."""
    server_learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 0.05
    server_warm_up: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Rounds, the first, over which the server's learning rate rises to its value."""
    server_cool_down: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Share of the rounds, at the end, over which it falls towards 0."""
    server_momentum: Fraction = 0.9
    average_decay: Fraction = 0.0
    """The released adapter is the exponential moving average of the server's iterates with this decay
    (post-processing); 0 releases the last one."""
    update_bound: Positive = 1.0
    """Each coordinate of a client's update is clipped to this before encoding."""

    @model_validator(mode="after")
    def _classes_are_sampled(self) -> TrainingConfig:
        if self.output_classes_by != "frequency" and self.output_classes is None:
            raise ValueError(
                f"output_classes_by is {self.output_classes_by!r}, and output_classes is not set: the softmax is over "
                "the whole head, and nothing is chosen"
            )
        return self


def withstood(cohort: int) -> int:
    """Most colluding clients with which a malicious server still gets one sum a round (docs/protocol.md)."""
    return 2 * default_threshold(cohort) - cohort - 1


def most_corrupt(fraction: float, cohort: int) -> int:
    """A fraction of a cohort as a number of clients, rounded up."""
    return math.ceil(fraction * cohort - 1e-9)  # less what binary fractions are off by: 0.29 of 100 is 29
