"""A run's text as token ids: what its clients train on, and the held-out sample every report of it is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fedpt_secure.config import RunConfig
from fedpt_secure.data import ClientText, FederatedText
from fedpt_secure.data.examples import Example, encode
from fedpt_secure.data.records import Record
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.federation.setup import RunModels, TrainingModels
from fedpt_secure.privacy import SmallExample

_Item = TypeVar("_Item")


def client_examples(client: ClientText, models: RunModels | TrainingModels, config: RunConfig) -> list[SmallExample]:
    """One client's training records, in the small LM's vocabulary."""
    token_map = models.small.token_map
    return [
        SmallExample(tuple(token_map.to_small(example.ids)), example.loss_from)
        for example in large_examples(client.train, models, config)
    ]


def held_out_sample(text: FederatedText, config: RunConfig, *, records: int | None = None) -> list[Record]:
    """The held-out records that a run is judged on: a seeded sample, the same for every reader of the run.

    Args:
        records: how many at most; None for the run's `evaluation.records`.
    """
    held_out = [record for client in text.clients for record in client.held_out]
    return seeded_sample(held_out, records or config.evaluation.records, purpose="evaluation sample", seed=config.seed)


def large_examples(records: Sequence[Record], models: RunModels | TrainingModels, config: RunConfig) -> list[Example]:
    """Records in the large LM's vocabulary, cut to the run's context length."""
    return [encode(record, models.tokenizer, context_length=config.models.context_length) for record in records]


def seeded_sample(items: Sequence[_Item], count: int, *, purpose: str, seed: int) -> list[_Item]:
    """At most `count` items, in their order; a larger count keeps those of a smaller one."""
    chosen = simulation_rng(purpose, seed).permutation(len(items))[:count]
    return [items[index] for index in sorted(chosen)]
