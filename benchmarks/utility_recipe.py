"""What `utility.py` trains with: one recipe, what departs from it where that was measured to be better, and the scale.

The recipe is a wide adapter on one matrix: cheap to train (all below is computed once), cheap to sum among many clients
and cheap to noise. Without noise a deeper adapter under many small steps, at a rate that rises and falls, learns more;
with noise but few clients a wider one costs little. Settings were chosen by simulated training on the data sets' own
training records, judged on held-out records that no reported figure is of (docs/results.md). Such a choice looks at
private records and is not in any epsilon, as in all published results of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from utility_data import Records

from fedpt_secure.config import RunConfig, overlay

FULL_MINUTES = 30.0
SURVIVING = 0.9
"""A round is aborted where fewer than this share answer, so that the noise of so many suffices (nobody drops here)."""
EVERY_POSITION = 128
"""As many as a record has tokens."""
ALL_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

COMMON: Mapping[str, Any] = {
    "privacy": {"mode": "distributed"},
    "lora": {"rank": 256},
    "training": {"sampled_positions": 32, "server_learning_rate": 0.02},
    "models": {"activation_cache_mb": 3072},
}


@dataclass(frozen=True)
class Scale:
    """What of the recipe follows from how much noise there is: with less of it to average out, more and smaller rounds.

    Attributes:
        rounds: of a run of at most 30 CPU minutes.
        clients: most in a round. A simulated round of secure aggregation costs as much as the square of them.
        records: expected number in a round's sum; the sampling rate follows from it and the (public) number of records.
    """

    rounds: int
    clients: int
    records: float

    @classmethod
    def of(cls, epsilon: float, records: int) -> Scale:
        """That of an epsilon and a number of training records, both public. Noise falls with their product."""
        return next(scale for least, scale in SCALES if epsilon * records >= least)

    def sampling_rate(self, *, clients: int, cohort: int, records: int) -> float:
        """The rate that gives a round of `cohort` out of `clients`, who have `records` together, what it expects."""
        return min(1.0, self.records * clients / (cohort * records))


SCALES = (
    (math.inf, Scale(rounds=110, clients=32, records=450)),
    (40_000, Scale(rounds=50, clients=107, records=900)),
    (0, Scale(rounds=28, clients=160, records=1850)),
)
"""By the least product of epsilon and records, descending."""


@dataclass(frozen=True)
class Recipe:
    """How a data set is trained on at an epsilon.

    Attributes:
        departures: what differs from `COMMON`.
        scale: nothing for the one that the noise gives.
    """

    departures: Mapping[str, Any] = field(default_factory=dict)
    scale: Scale | None = None

    @classmethod
    def of(cls, data: str, epsilon: float) -> Recipe:
        """That of one of `utility_data.NAMES`."""
        fitting = (recipe for (name, least), recipe in DEPARTURES.items() if name == data and epsilon >= least)
        return next(fitting, cls())

    def settings(self) -> dict[str, Any]:
        """Of the run, but for its data, seed and epsilon."""
        return overlay(dict(COMMON), dict(self.departures))

    def for_records(self, config: RunConfig, records: Records, minutes: float = FULL_MINUTES) -> RunConfig:
        """The configuration with what suits the data and the noise (`Scale`), where it does not say it itself.

        Args:
            minutes: that the run may take; the rounds are a proportion of the scale's.
        """
        federation, privacy = config.federation, config.privacy
        scale = self.scale or Scale.of(privacy.epsilon, len(records.train))
        cohort = federation.cohort or min(records.clients, scale.clients)
        rate = scale.sampling_rate(clients=records.clients, cohort=cohort, records=len(records.train))
        suited: dict[str, dict[str, Any]] = {
            "federation": {
                "rounds": max(1, round(scale.rounds * minutes / FULL_MINUTES)),
                "cohort": cohort,
                "minimum_survivors": math.ceil(SURVIVING * cohort),
            },
            "privacy": {"sampling_rate": float(f"{rate:.3g}")},
            # So that a round's mean is over the records it expects, as in simulation, where rates were chosen. Adam
            # does not see the difference; momentum does.
            "training": {"normaliser": float(f"{len(records.train) / records.clients:.4g}")},
        }
        changed = {}
        for name, values in suited.items():
            section = getattr(config, name)
            said = section.model_fields_set
            changed[name] = section.model_copy(update={key: value for key, value in values.items() if key not in said})
        return config.model_copy(update=changed)


def _deep(rate: float, *, whitening: float, clients: int) -> Recipe:
    """Without noise: all matrices of three layers, under many small steps whose rate rises and falls."""
    return Recipe(
        {
            "lora": {"rank": 128, "layers": 3, "modules": ALL_MATRICES, "whitening": whitening},
            "training": {
                "sampled_positions": EVERY_POSITION,
                "server_learning_rate": rate,
                "server_warm_up": 10,
                "server_cool_down": 0.5,
            },
        },
        Scale(rounds=480, clients=clients, records=32),
    )


def _wide(rate: float, scale: Scale, *, average_decay: float = 0.0, **classes: Any) -> Recipe:
    """Under noise: the common matrix, with a bias of the head's classes, by every record's every position.

    Args:
        rate: of the server's momentum, which unlike Adam's follows the noise.
        classes: settings of the sampled softmax.
    """
    return Recipe(
        {
            "lora": {"output_bias": 0.03},
            "training": {
                "sampled_positions": EVERY_POSITION,
                "server_optimizer": "momentum",
                "server_learning_rate": rate,
                "average_decay": average_decay,
                **classes,
            },
        },
        scale,
    )


DEPARTURES: Mapping[tuple[str, float], Recipe] = {
    ("chat", math.inf): _deep(0.0015, whitening=0.0, clients=5),
    ("chat", 8.0): _wide(
        36.0,
        Scale(rounds=64, clients=214, records=2500),
        average_decay=0.8,
        output_classes=768,
        output_classes_by="record",
    ),
    ("chat", 4.0): _wide(27.0, Scale(rounds=48, clients=214, records=1850), output_classes=2048),
    ("medquad", math.inf): _deep(0.0025, whitening=0.5, clients=4),
    ("medquad", 8.0): Recipe(
        {"lora": {"rank": 512, "whitening": 0.5}, "training": {"sampled_positions": 64, "output_classes": 2048}},
        Scale(rounds=56, clients=9, records=3700),
    ),
    ("medquad", 0.0): Recipe(
        {"lora": {"rank": 128, "modules": ALL_MATRICES, "whitening": 0.5}, "training": {"server_learning_rate": 0.015}}
    ),
}
"""By data set and least epsilon, descending."""
