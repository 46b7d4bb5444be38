"""Who trains which part of the adapter in which round. Public, fixed before the first round, never from data.

A client declares its tier when it joins: how much memory it has, how large a rank and how many layers it trains. In a
simulation the settings name each tier's share of the clients, and the seed deals them. Rounds may be restricted to a
block of layers, the same for everybody. Vectors keep one length: what a client does not train is zero in its own, so
that the secure sum is defined.

**Aggregation of mixed parts.** Entry k of the mean update is the sum of entry k over the survivors, divided by the
number of survivors who train entry k in this round, and 0 where nobody does. Who survived and who trains what is
public, so the division is post-processing. (Dividing by all survivors would shrink the entries that few train.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedpt_secure.config import RunConfig, Tier
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.memory import training_memory
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM


def declare_tiers(config: RunConfig, client_ids: Sequence[str]) -> dict[str, Tier]:
    """Each simulated client's declaration, from its name and the seed alone; empty where the settings have no tiers."""
    tiers = config.federation.tiers
    if not tiers:
        return {}
    ordered = sorted(client_ids)
    dealt = [ordered[index] for index in simulation_rng("tiers", config.seed).permutation(len(ordered))]
    ends = np.rint(np.cumsum([tier.share for tier in tiers]) * len(dealt)).astype(int)
    ends[-1] = len(dealt)
    return {client: tiers[int(np.searchsorted(ends, index, side="right"))] for index, client in enumerate(dealt)}


def require_memory(config: RunConfig, small: SmallLM) -> None:
    """Refuse a run that would pass the memory which a tier has declared.

    Raises:
        ConfigError: what the tier would train takes more, by an estimate from shapes.
    """
    for tier in config.federation.tiers:
        if tier.memory_mb is None:
            continue
        # Under blocks of layers the lowest one counts, which takes as much as all of them.
        layers = None if tier.layers is None else frozenset(small.adapted_layers[-tier.layers :])
        memory = training_memory(small, TrainedPart(layers), context_length=config.models.context_length)
        if memory.total > tier.memory_mb * 1_000_000:
            raise ConfigError(
                f"tier {tier.name!r} has {tier.memory_mb} MB, but its training takes {memory.total / 1e6:.0f} MB: "
                f"weights {memory.weights / 1e6:.0f}, kept activations {memory.kept / 1e6:.0f}, backward pass "
                f"{memory.backward / 1e6:.0f}, the rest {memory.working / 1e6:.0f}",
                hint="a smaller models.activation_cache_mb, fewer layers, or a smaller models.context_length",
            )


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What every client trains in every round.

    Attributes:
        tiers: by client; empty if all train alike.
        adapted_layers: layers with an adapter, ascending.
        blocks: layers that rounds train, in turn; empty if every round trains all.
    """

    tiers: Mapping[str, Tier] = field(default_factory=dict)
    adapted_layers: tuple[int, ...] = ()
    blocks: tuple[frozenset[int], ...] = ()

    @classmethod
    def of(cls, config: RunConfig, client_ids: Sequence[str], adapted_layers: Sequence[int]) -> TrainingPlan:
        """The plan that the settings describe.

        Raises:
            ConfigError: a tier or a round would train more layers than have an adapter.
        """
        layers, size = tuple(sorted(adapted_layers)), config.training.layers_per_round
        wanted = [(f"tier {tier.name!r}", tier.layers) for tier in config.federation.tiers]
        for what, count in [*wanted, ("training.layers_per_round", size)]:
            if count is not None and count > len(layers):
                raise ConfigError(
                    f"{what} has {count} layers, but {len(layers)} have an adapter", hint="see lora.layers"
                )
        # From the top: the loss reaches those layers with the shortest backward pass, and first rounds count most.
        downwards = layers[::-1]
        blocks = (
            () if size is None else tuple(frozenset(downwards[at : at + size]) for at in range(0, len(layers), size))
        )
        return cls(declare_tiers(config, client_ids), layers, blocks)

    @property
    def trains_everything(self) -> bool:
        """Whether every client trains the whole adapter in every round."""
        return not self.tiers and not self.blocks

    def part(self, client_id: str, round_index: int) -> TrainedPart:
        """What a client trains in a round. It depends on nothing else.

        Raises:
            ConfigError: the plan has tiers, and none for this client.
        """
        if self.trains_everything:
            return WHOLE
        layers = self.blocks[round_index % len(self.blocks)] if self.blocks else None
        if not self.tiers:
            return TrainedPart(layers)
        if client_id not in self.tiers:
            raise ConfigError(f"client {client_id!r} has declared no tier")
        tier = self.tiers[client_id]
        if tier.layers is not None:
            layers = frozenset(self.adapted_layers[-tier.layers :])
        return TrainedPart(layers, tier.rank)

    def contributors(
        self, small: SmallLM, survivors: Sequence[str], round_index: int
    ) -> npt.NDArray[np.float64] | None:
        """How many of the survivors train each entry of the adapter, `[d]`; None if all of them train all."""
        if self.trains_everything:
            return None
        counts = np.zeros(small.dimension)
        for client in survivors:
            counts += small.coordinates(self.part(client, round_index))
        return counts

    def digest(self, config_digest: bytes) -> bytes:
        """SHA-256 of the settings and everybody's declaration: what server and clients agree on, and clients sign."""
        if self.trains_everything:
            return config_digest
        content = {
            "tiers": {client: tier.model_dump() for client, tier in sorted(self.tiers.items())},
            "adapted_layers": self.adapted_layers,
            "blocks": [sorted(block) for block in self.blocks],
        }
        return hashlib.sha256(config_digest + json.dumps(content, sort_keys=True).encode()).digest()


EVERYTHING = TrainingPlan()
"""All clients train the whole adapter in every round."""
