"""Clients that train different parts of one adapter: the sum is defined, the mean fair, and data choose nothing."""

from __future__ import annotations

import inspect
import math
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import RunConfig, Tier, build
from fedpt_secure.crypto import Identity, Roster
from fedpt_secure.errors import ConfigError, RoundError
from fedpt_secure.federation import ClientTerms, ClientWorker
from fedpt_secure.federation.announcement import Announcement
from fedpt_secure.federation.local_engine import run_round
from fedpt_secure.federation.mechanisms import build_mechanism
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.federation.terms import client_randomness, config_digest
from fedpt_secure.federation.tiers import EVERYTHING, TrainingPlan, declare_tiers
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.part import TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import Budget, InsecureDeterministicRandom, Ledger, SmallExample, clipped_sum
from fedpt_secure.progress import SILENT

VOCABULARY, RUN_ID, CLIP_NORM = 32, bytes(16), 0.05
IDS = tuple(f"client {index}" for index in range(6))
TIERS = [
    {"name": "laptop", "share": 0.5},
    {"name": "phone", "share": 0.5, "rank": 1, "layers": 1},
]
MODES = ("local", "distributed", "client")


def config_of(mode="local", tiers=TIERS, **training) -> RunConfig:
    return build(
        RunConfig,
        {
            "federation": {"rounds": 4, "cohort": 6, "tiers": tiers},
            "privacy": {"mode": mode, "clip_norm": CLIP_NORM, "sampling_rate": 1.0},
            "lora": {"rank": 3, "layers": 0},
            "training": {"normaliser": 3.0, "local_learning_rate": 0.5, **training},
            "insecure_deterministic": True,
        },
    )


@pytest.fixture(scope="module")
def small() -> SmallLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    made = SmallLM(base, config_of().lora, seed=0, device=torch.device("cpu"))
    made.load_adapter_vector(np.random.default_rng(0).normal(0, 0.1, made.dimension).astype(np.float32))
    return made


def records(client: int) -> list[SmallExample]:
    rng = np.random.default_rng(client)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, 8).tolist()), 1) for _ in range(2 + client % 3)]


def plan_of(config, small) -> TrainingPlan:
    return TrainingPlan.of(config, IDS, small.adapted_layers)


# What is declared, and that it is no choice of the data's.


def test_shares_are_dealt_from_names_and_the_seed_alone():
    ids = [f"client {index}" for index in range(100)]
    tiers = [
        {"name": "a", "share": 0.2},
        {"name": "b", "share": 0.5, "rank": 2},
        {"name": "c", "share": 0.3, "rank": 1},
    ]
    config = config_of(tiers=tiers)
    declared = declare_tiers(config, ids)
    assert Counter(tier.name for tier in declared.values()) == {"a": 20, "b": 50, "c": 30}
    assert declare_tiers(config, ids[::-1]) == declared
    assert declare_tiers(config.model_copy(update={"seed": 1}), ids) != declared
    # Nothing about records can go in: neither here, nor where a round asks what a client trains.
    assert list(inspect.signature(declare_tiers).parameters) == ["config", "client_ids"]
    assert list(inspect.signature(TrainingPlan.part).parameters) == ["self", "client_id", "round_index"]
    assert list(inspect.signature(TrainingPlan.of).parameters) == ["config", "client_ids", "adapted_layers"]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_client_trains_does_not_depend_on_its_records(mode, small):
    """With other records, or none, the same entries are zero, and in mode local the same entries have noise."""
    config = config_of(mode)
    plan, mechanism = plan_of(config, small), build_mechanism(config, noise_multiplier=0.0, dimension=small.dimension)
    noisy = build_mechanism(config, noise_multiplier=1.0, dimension=small.dimension)
    for client in IDS:
        part = plan.part(client, 0)
        mask = small.coordinates(part)
        for data in (records(0), records(1), []):
            source = InsecureDeterministicRandom(0, client)
            released = mechanism.release(small, data, clip_norm=CLIP_NORM, noise=source, part=part)
            assert not released[~mask].any()
            if mode == "local":
                source = InsecureDeterministicRandom(0, client)
                released = noisy.release(small, data, clip_norm=CLIP_NORM, noise=source, part=part)
                assert ((released != 0) == mask).all()


def test_in_the_ring_untrained_entries_are_as_noisy_as_the_others(small):
    """The sum's noise comes from everybody's shares, so that a client who trains less must not add less."""
    config = config_of("distributed")
    mechanism = build_mechanism(config, noise_multiplier=1.0, dimension=small.dimension)
    mask = small.coordinates(TrainedPart(frozenset({1}), 1))
    shares = []
    for trial in range(60):
        source = InsecureDeterministicRandom(trial, "share")
        ring = mechanism.release(small, [], clip_norm=CLIP_NORM, noise=source, part=TrainedPart(frozenset({1}), 1))
        shares.append(ring.view(np.int32).astype(float) if ring.dtype == np.uint32 else ring.astype(float))
    deviations = np.std(shares, axis=0)
    assert np.mean(deviations[mask]) == pytest.approx(np.mean(deviations[~mask]), rel=0.2)
    assert deviations.min() > 0.5 * deviations.mean()


# The sum of mixed parts.


def federation(config, small, tmp_path, plan):
    identities = {client: Identity.generate() for client in IDS}
    roster = Roster({client: identity.verify_key_bytes for client, identity in identities.items()})
    mechanism = build_mechanism(config, noise_multiplier=0.0, dimension=small.dimension)
    digest = plan.digest(config_digest(config))
    unit = "client" if config.privacy.mode == "client" else "record"
    workers = {
        client: ClientWorker(
            client,
            records(index),
            terms=ClientTerms(RUN_ID, config, digest, mechanism, (IDS,) * config.federation.rounds, plan),
            identity=identities[client],
            roster=roster,
            ledger=Ledger.create(tmp_path / str(index), budget=Budget(math.inf, 1e-5, unit)),
            randomness=client_randomness(config, client),
        )
        for index, client in enumerate(IDS)
    }

    def server(round_index, *, digest=digest):
        adapter = small.adapter_vector()
        return AggregationServer(
            config=config,
            config_digest=digest,
            run_id=RUN_ID,
            round_index=round_index,
            attempt=0,
            cohort=IDS,
            roster=roster,
            adapter=adapter,
            model_digest=small.weights_digest(adapter),
            mechanism=mechanism,
            clip_norm=CLIP_NORM,
            contributors=lambda survivors: plan.contributors(small, survivors, round_index),
        )

    return workers, server


def plain_mean(config, small, plan, survivors, round_index) -> np.ndarray:
    """The rule in so many words, without ring, masks or mechanism: entry by entry, the mean over those who train it."""
    total, count = np.zeros(small.dimension), np.zeros(small.dimension)
    for client in survivors:
        data = records(IDS.index(client))
        part = plan.part(client, round_index)
        mask = small.coordinates(part)
        if config.privacy.mode == "client":
            gradient = clipped_sum(small, data, clip_norm=math.inf).vector * mask
            update = -0.5 / len(data) * gradient
            update *= min(1.0, CLIP_NORM / np.linalg.norm(update))
        else:
            update = np.zeros(small.dimension)
            for record in data:
                gradient = clipped_sum(small, [record], clip_norm=math.inf).vector * mask
                update -= 0.5 / 3.0 * gradient * min(1.0, CLIP_NORM / np.linalg.norm(gradient))
        total += update
        count += mask
    return np.where(count > 0, total / np.maximum(count, 1), 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_secure_sum_of_mixed_ranks_is_the_plain_computation(mode, small, tmp_path):
    config = config_of(mode)
    plan = plan_of(config, small)
    assert len({plan.part(client, 0) for client in IDS}) == 2
    workers, server = federation(config, small, tmp_path, plan)
    gone = IDS[2]
    aggregate, transcript = run_round(server(0), workers, small, dropouts={gone: "mask"}, progress=SILENT)
    survivors = [client for client in IDS if client != gone]
    assert list(transcript.survivors) == survivors
    expected = plain_mean(config, small, plan, survivors, 0)
    assert np.abs(expected).max() > 1e-4
    assert np.abs(aggregate.mean_update - expected).max() < 1e-6
    # The broken variant: divided by all survivors, entries that some do not train shrink.
    contributors = plan.contributors(small, survivors, 0)
    shared = contributors < len(survivors)
    assert shared.any()
    assert np.abs((expected * contributors / len(survivors))[shared] - aggregate.mean_update[shared]).max() > 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_round_of_a_block_trains_the_block_and_nothing_else(mode, small, tmp_path):
    config = config_of(mode, tiers=[], layers_per_round=1)
    plan = plan_of(config, small)
    assert [plan.part(IDS[0], index).layers for index in range(4)] == [{1}, {0}, {1}, {0}]
    workers, server = federation(config, small, tmp_path, plan)
    for round_index in (0, 1):
        aggregate, _ = run_round(server(round_index), workers, small, dropouts={}, progress=SILENT)
        inside = small.coordinates(TrainedPart(frozenset({1 - round_index})))
        assert (aggregate.trained == inside).all()
        assert not aggregate.mean_update[~inside].any()
        assert np.abs(aggregate.mean_update - plain_mean(config, small, plan, IDS, round_index)).max() < 1e-6
        assert np.abs(aggregate.mean_update[inside]).max() > 1e-5


def test_entries_that_no_survivor_trains_do_not_move(small):
    config = config_of(tiers=[{"name": "phone", "share": 1.0, "rank": 1, "layers": 1}])
    plan = plan_of(config, small)
    counts = plan.contributors(small, IDS[:4], 0)
    mask = small.coordinates(TrainedPart(frozenset({1}), 1))
    assert (counts == np.where(mask, 4, 0)).all()
    mechanism = build_mechanism(config, noise_multiplier=0.0, dimension=small.dimension)
    total = np.full(mechanism.vector_length, 7, dtype=np.uint32)
    mean = mechanism.decode(total, survivors=4, clip_norm=CLIP_NORM, contributors=counts).mean_update
    assert (mean[~mask] == 0).all()
    assert (mean[mask] != 0).all()


# Who signs what.


def test_the_digest_that_clients_sign_covers_the_tiers(small, tmp_path):
    """The same settings, one client's declaration exchanged: other digests, and the round is refused."""
    config = config_of()
    plan = plan_of(config, small)
    one = next(client for client in IDS if plan.tiers[client].name == "phone")
    exchanged = TrainingPlan({**plan.tiers, one: config.federation.tiers[0]}, plan.adapted_layers, plan.blocks)
    digests = {item.digest(config_digest(config)) for item in (plan, exchanged, EVERYTHING)}
    assert len(digests) == 3
    workers, server = federation(config, small, tmp_path, plan)
    honest, other = server(0), server(0, digest=exchanged.digest(config_digest(config)))
    assert honest.context.model_digest != other.context.model_digest
    with pytest.raises(RoundError, match="another run or configuration"):
        workers[IDS[0]].announce(other.announcement, small)
    # A server that signs one plan and announces another gets no valid signatures: it sees nobody's keys.
    decoded = Announcement.from_bytes(other.announcement)
    forged = msgspec.structs.replace(decoded, config_digest=plan.digest(config_digest(config))).to_bytes()
    answer = workers[IDS[0]].announce(forged, small)
    other.receive("advertise", IDS[0], answer)
    assert len(other.rejected) == 1


def test_the_statement_and_the_cost_do_not_depend_on_tiers(small):
    for mode in MODES:
        costs = {
            build_mechanism(config_of(mode, tiers=tiers), noise_multiplier=1.5, dimension=small.dimension).cost
            for tiers in (TIERS, [])
        }
        assert len(costs) == 1


def test_one_record_moves_a_parts_sum_by_at_most_the_clip_norm(small):
    """A part's gradient is clipped by its own norm: the sensitivity is that of the whole."""
    data = records(2)
    for part in (TrainedPart(frozenset({1}), 1), TrainedPart(None, 2), TrainedPart(frozenset({0}))):
        whole, less = (clipped_sum(small, world, clip_norm=1e-3, part=part).vector for world in (data, data[1:]))
        assert 0.999e-3 <= np.linalg.norm(whole - less) <= 1e-3


@pytest.mark.parametrize("part", [TrainedPart(frozenset({1}), 2), TrainedPart(frozenset({0}), 1), TrainedPart(None, 2)])
def test_a_parts_gradient_is_the_whole_ones_with_zeros_elsewhere(part, small):
    for split in (small.split, None):
        whole, small.split = small.split, split
        try:
            mine, all_of_it = (
                clipped_sum(small, records(3), clip_norm=math.inf, **way).vector for way in ({"part": part}, {})
            )
        finally:
            small.split = whole
        mask = small.coordinates(part)
        assert not mine[~mask].any()
        assert np.allclose(mine[mask], all_of_it[mask], rtol=1e-4, atol=1e-7)


# Settings that cannot be.


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tiers": [{"name": "a", "share": 0.5}]}, "add up to 0.5"),
        ({"tiers": [{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}]}, "same name"),
        ({"tiers": [{"name": "a", "share": 1.0, "rank": 4}]}, "above lora.rank 3"),
        ({"tiers": [{"name": "a", "share": 1.0, "rank": 0}]}, "rank"),
        ({"tiers": [{"name": "a", "share": 1.0, "layers": 1}], "layers_per_round": 1}, "chooses layers"),
    ],
)
def test_tiers_that_cannot_be_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        config_of(**changes)


@pytest.mark.parametrize(
    "changes", [{"layers_per_round": 3, "tiers": []}, {"tiers": [{**TIERS[1], "share": 1.0, "layers": 3}]}]
)
def test_more_layers_than_have_an_adapter_are_refused(changes, small):
    with pytest.raises(ConfigError, match="have an adapter"):
        plan_of(config_of(**changes), small)


def test_a_client_that_declared_nothing_has_no_part(small):
    with pytest.raises(ConfigError, match="declared no tier"):
        plan_of(config_of(), small).part("stranger", 0)


def test_tiers_come_back_from_toml():
    config = config_of()
    assert config.federation.tiers[1] == Tier(name="phone", share=0.5, rank=1, layers=1)
    import tomllib

    assert build(RunConfig, tomllib.loads(config.to_toml())) == config
