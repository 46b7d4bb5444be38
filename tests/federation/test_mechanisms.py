"""A round's mechanism, built from a run's configuration: it costs what was calibrated, and yields the mean update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import RunConfig, build, withstood
from fedpt_secure.crypto import Identity, Roster, default_threshold
from fedpt_secure.errors import ConfigError, FedptError, PrivacyError, RoundError
from fedpt_secure.federation import ClientTerms, ClientWorker
from fedpt_secure.federation.announcement import Announcement
from fedpt_secure.federation.local_engine import run_round
from fedpt_secure.federation.mechanisms import (
    CLIP_RANGE,
    LocalMechanism,
    RingNoiseMechanism,
    build_mechanism,
    honest_survivors,
    quantile_clipping,
)
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.federation.terms import calibrate, client_randomness, config_digest, require_meaningful_delta
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import (
    Budget,
    InsecureDeterministicRandom,
    Ledger,
    SmallExample,
    clipped_sum,
    epsilon_spent,
)
from fedpt_secure.progress import SILENT

VOCABULARY = 32
IDS = tuple(f"client {index}" for index in range(5))
RUN_ID = bytes(16)
KINDS = [("local", "fixed"), ("distributed", "fixed"), ("distributed", "quantile"), ("client", "fixed")]
KINDS.append(("client", "quantile"))


def settings(mode="distributed", clipping="fixed", **groups):
    """Five clients, four of whom survive at least and one of whom may collude."""
    values = {
        "privacy": {"mode": mode, "clipping": clipping, "clip_norm": 0.05, "corrupt_fraction": 0.2},
        "federation": {"rounds": 2, "cohort": 5},
        "training": {"normaliser": 3.0, "local_learning_rate": 0.5},
        "lora": {"rank": 1},
        "insecure_deterministic": True,
    }
    return {
        key: {**value, **groups.pop(key, {})} if isinstance(value, dict) else value for key, value in values.items()
    }


def config_of(*args, **kwargs):
    return build(RunConfig, settings(*args, **kwargs))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    made = SmallLM(base, config_of().lora, seed=0, device=torch.device("cpu"))
    made.load_adapter_vector(np.random.default_rng(0).normal(0, 0.1, made.dimension).astype(np.float32))
    return made


def data_of(clients, seed=1):
    """From 2 to 5 records each."""
    rng = np.random.default_rng(seed)
    return [
        [SmallExample(tuple(rng.integers(0, VOCABULARY, 8).tolist()), 1) for _ in range(2 + index % 4)]
        for index in range(clients)
    ]


def mechanism_of(config, small, noise_multiplier):
    return build_mechanism(config, noise_multiplier=noise_multiplier, dimension=small.dimension)


def decoded(mechanism, small, clients, *, clip_norm, survivors=None):
    total = None
    for index, records in enumerate(clients):
        noise = InsecureDeterministicRandom(1, index)
        released = mechanism.release(small, records, clip_norm=clip_norm, noise=noise)
        ring = mechanism.to_ring(released, noise.random_bytes)
        assert ring.shape == (mechanism.vector_length,)
        total = ring.copy() if total is None else total + ring
    return mechanism.decode(total, survivors=survivors or len(clients), clip_norm=clip_norm)


# What a round yields.


@pytest.mark.parametrize(("mode", "clipping"), [kind for kind in KINDS if kind[0] != "client"])
def test_without_noise_the_mean_update_is_the_step_of_central_dp_sgd(mode, clipping, small):
    """The same clipped gradients over the union of the clients' records, and the same public constants."""
    config, clients = config_of(mode, clipping), data_of(5)
    mechanism = mechanism_of(config, small, 0.0)
    mean = decoded(mechanism, small, clients, clip_norm=0.05).mean_update
    union = clipped_sum(small, [record for records in clients for record in records], clip_norm=0.05)
    expected = -0.5 * union.vector / (5 * 3.0)
    assert np.abs(expected).max() > 1e-4
    assert np.abs(mean - expected).max() < 1e-6


@pytest.mark.parametrize("clipping", ["fixed", "quantile"])
def test_without_noise_the_mean_update_is_that_of_the_clients_clipped_updates(clipping, small):
    config, clients = config_of("client", clipping, training={"local_steps": 1}), data_of(5)
    mean = decoded(mechanism_of(config, small, 0.0), small, clients, clip_norm=0.05).mean_update
    updates = [-0.5 / len(records) * clipped_sum(small, records, clip_norm=math.inf).vector for records in clients]
    clipped = [update * min(1.0, 0.05 / np.linalg.norm(update)) for update in updates]
    assert np.abs(mean - np.mean(clipped, axis=0)).max() < 1e-6


@pytest.mark.parametrize(("mode", "clipping"), KINDS[1:])
def test_the_noise_of_the_mean_update_is_that_of_the_shares(mode, clipping, small):
    """Empty data, five shares; the standard deviation within 6 of its own (false alarm 1e-8 for another seed)."""
    config = config_of(mode, clipping)
    mechanism = mechanism_of(config, small, 2.0)
    mean = decoded(mechanism, small, [[]] * 5, clip_norm=0.05).mean_update
    in_clip_norms = math.sqrt(5) * mechanism.ring.share_sigma / mechanism.ring.encoding.scale
    step = 0.05 / 5 if mode == "client" else 0.5 * 0.05 / (5 * 3.0)
    expected = in_clip_norms * step
    assert abs(mean.std() / expected - 1) < 6 / math.sqrt(2 * small.dimension)


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_a_smaller_rate_is_made_up_for_in_the_mean(mode, small):
    """The public estimate of the sample, not its secret size, is what sums are divided by."""
    clients = data_of(5)
    whole = mechanism_of(config_of(mode), small, 0.0)
    half = mechanism_of(config_of(mode, privacy={"sampling_rate": 0.5}), small, 0.0)
    total = np.arange(whole.vector_length, dtype=np.uint32)
    one, other = (item.decode(total, survivors=len(clients), clip_norm=0.05).mean_update for item in (whole, half))
    assert np.allclose(2 * one, other, rtol=1e-12)


# What a round costs.


@pytest.mark.parametrize(("mode", "clipping"), KINDS)
def test_a_release_costs_what_was_calibrated(mode, clipping, small):
    """Never less noise than asked for, hardly more, and the run's whole epsilon stays within the target."""
    config = config_of(mode, clipping, privacy={"epsilon": 2.0, "delta": 1e-3}, training={"local_steps": 1})
    multiplier = calibrate(config, (IDS,) * 2)
    mechanism = mechanism_of(config, small, multiplier)
    assert multiplier * (1 - 1e-12) <= mechanism.cost.noise_multiplier <= multiplier * 1.001
    assert (mechanism.cost.sampling_rate, mechanism.cost.steps) == (1.0, 1)
    spent = epsilon_spent((mechanism.cost, mechanism.cost), delta=1e-3)
    assert 1.95 < spent <= 2.0


def test_local_steps_are_each_charged_in_mode_local_and_together_in_mode_client(small):
    local = mechanism_of(config_of("local", training={"local_steps": 3}), small, 1.5)
    client = mechanism_of(config_of("client", training={"local_steps": 3}), small, 1.5)
    assert (local.cost.steps, client.cost.steps) == (3, 1)
    for mode, steps in (("local", 6), ("client", 2)):
        config = config_of(mode, privacy={"epsilon": 2.0, "delta": 1e-3}, training={"local_steps": 3})
        multiplier = calibrate(config, (IDS,) * 2)
        alike = config_of("local", privacy={"epsilon": 2.0, "delta": 1e-3})
        assert multiplier == calibrate(alike, (IDS,) * steps)


def test_the_cost_counts_the_fewest_honest_survivors_only(small):
    config = config_of()
    mechanism = mechanism_of(config, small, 1.0)
    assert (honest_survivors(config), mechanism.ring.honest_shares, mechanism.ring.cohort) == (3, 3, 5)
    assert mechanism.cost.noise_multiplier == mechanism.ring.noise_multiplier(3)
    bolder = mechanism_of(config_of(privacy={"corrupt_fraction": 0.0}), small, 1.0)
    assert bolder.ring.honest_shares == 4
    careful = mechanism_of(config_of(federation={"minimum_survivors": 5}), small, 1.0)
    assert careful.ring.honest_shares == 4
    shares = [item.ring.share_sigma / item.ring.encoding.scale for item in (mechanism, bolder)]
    assert shares[0] > shares[1]


def test_adaptive_clipping_costs_its_indicators_part_of_the_sensitivity(small):
    fixed, adaptive = (
        mechanism_of(config_of("distributed", clipping), small, 1.0) for clipping in ("fixed", "quantile")
    )
    assert adaptive.vector_length == fixed.vector_length + 1 == small.dimension + 1
    assert adaptive.ring.dimension == adaptive.vector_length
    assert adaptive.ring.unit_norm == pytest.approx(math.sqrt(1 + 0.1**2))
    shares = [item.ring.share_sigma / item.ring.encoding.scale for item in (fixed, adaptive)]
    assert shares[1] / shares[0] == pytest.approx(math.sqrt(1 + 0.1**2), rel=1e-3)


@pytest.mark.parametrize(("mode", "clipping"), KINDS)
def test_only_a_release_with_all_its_own_noise_may_be_sent_again(mode, clipping, small):
    mechanism = mechanism_of(config_of(mode, clipping), small, 1.0)
    assert mechanism.resendable is (mode == "local")
    assert isinstance(mechanism, LocalMechanism if mode == "local" else RingNoiseMechanism)


@pytest.mark.parametrize(("mode", "clipping"), KINDS)
def test_no_noise_is_charged_as_none(mode, clipping, small):
    mechanism = mechanism_of(config_of(mode, clipping), small, 0.0)
    assert mechanism.cost.noise_multiplier == 0.0
    assert epsilon_spent((mechanism.cost,), delta=1e-5) == math.inf


@pytest.mark.parametrize("mode", ["local", "distributed", "client"])
def test_infinite_epsilon_calibrates_to_no_noise(mode):
    config = config_of(mode, privacy={"epsilon": math.inf, "delta": 0.9})
    assert calibrate(config, (IDS,)) == 0.0
    require_meaningful_delta(config, dict.fromkeys(IDS, 10))


# A round over the protocol: what the ledger is charged, and the clip norm on its way.


def federation(config, small, tmp_path, *, noise_multiplier=2.0):
    identities = {client: Identity.generate() for client in IDS}
    roster = Roster({client: identity.verify_key_bytes for client, identity in identities.items()})
    mechanism = mechanism_of(config, small, noise_multiplier)
    unit = "client" if config.privacy.mode == "client" else "record"
    workers = {
        client: ClientWorker(
            client,
            records,
            terms=ClientTerms(RUN_ID, config, config_digest(config), mechanism, (IDS,) * config.federation.rounds),
            identity=identities[client],
            roster=roster,
            ledger=Ledger.create(tmp_path / client, budget=Budget(math.inf, 1e-5, unit)),
            randomness=client_randomness(config, client),
        )
        for client, records in zip(IDS, data_of(5), strict=True)
    }

    def server(round_index, clip_norm, attempt=0):
        adapter = small.adapter_vector()
        return AggregationServer(
            config=config,
            config_digest=config_digest(config),
            run_id=RUN_ID,
            round_index=round_index,
            attempt=attempt,
            cohort=IDS,
            roster=roster,
            adapter=adapter,
            model_digest=small.weights_digest(adapter),
            mechanism=mechanism,
            clip_norm=clip_norm,
        )

    return workers, server, mechanism


@pytest.mark.parametrize(("mode", "clipping"), KINDS)
def test_each_ledger_is_charged_the_mechanisms_cost_once_a_round(mode, clipping, small, tmp_path):
    workers, server, mechanism = federation(config_of(mode, clipping), small, tmp_path)
    for round_index in range(2):
        aggregate, _ = run_round(server(round_index, 0.05), workers, small, dropouts={}, progress=SILENT)
        assert aggregate.mean_update.shape == (small.dimension,)
    for client, worker in workers.items():
        assert [(item.round_index, item.spent, item.mode) for item in worker.releases] == [
            (0, mechanism.cost, mode),
            (1, mechanism.cost, mode),
        ]
        assert sum(item.steps for item in Ledger(tmp_path / client).history()) == 2


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_a_client_whose_share_has_left_sits_out_every_further_attempt(mode, small, tmp_path):
    """Fewer than the minimum survive the first attempt; two shares have left, and nobody opens anything."""
    workers, server, _ = federation(config_of(mode), small, tmp_path)
    first, transcript = run_round(
        server(0, 0.05), workers, small, dropouts=dict.fromkeys(IDS[:3], "mask"), progress=SILENT
    )
    assert first is None
    assert transcript.survivors == ()
    again, transcript = run_round(server(0, 0.05, attempt=1), workers, small, dropouts={}, progress=SILENT)
    assert again is None
    assert set(transcript.dropped) == set(IDS[3:])
    assert all("already" in reason for reason in transcript.dropped.values())
    assert all(len(workers[client].releases) == 1 for client in IDS[3:])


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_the_quantiles_clip_norm_travels_to_the_clients_and_back(mode, small, tmp_path):
    """All norms lie below the largest clip norm and above the smallest, so that it shrinks or grows."""
    config = config_of(mode, "quantile", privacy={"clip_norm": 0.01})
    workers, server, _ = federation(config, small, tmp_path, noise_multiplier=0.0)
    after = {}
    for round_index, clip_norm in enumerate((1.0, 1e-4)):
        aggregate, _ = run_round(server(round_index, clip_norm), workers, small, dropouts={}, progress=SILENT)
        after[clip_norm] = aggregate.clip_norm
    assert after[1.0] < 1.0
    assert after[1e-4] > 1e-4
    if mode == "client":
        assert after[1.0] == pytest.approx(math.exp(-0.2 * 0.5), rel=1e-5)


@pytest.mark.parametrize(("mode", "clipping"), [("local", "fixed"), ("client", "fixed"), ("distributed", "fixed")])
def test_a_fixed_clip_norm_stays(mode, clipping, small, tmp_path):
    workers, server, _ = federation(config_of(mode, clipping), small, tmp_path)
    aggregate, _ = run_round(server(0, 0.05), workers, small, dropouts={}, progress=SILENT)
    assert aggregate.clip_norm == 0.05


@pytest.mark.parametrize(("mode", "clipping"), KINDS)
def test_a_client_takes_no_clip_norm_but_one_within_the_agreed_range(mode, clipping, small, tmp_path):
    workers, server, _ = federation(config_of(mode, clipping), small, tmp_path)
    span = 1.0 if clipping == "fixed" else CLIP_RANGE
    content = server(0, 0.05).announcement
    for wrong in (0.05 * span * 1.01, 0.05 / span * 0.99, 0.0, -0.05, math.inf, math.nan):
        announcement = Announcement.from_bytes(content)
        announcement = type(announcement)(
            **{name: getattr(announcement, name) for name in announcement.__struct_fields__} | {"clip_norm": wrong}
        )
        with pytest.raises(RoundError):
            workers[IDS[0]].announce(announcement.to_bytes(), small)
    workers[IDS[0]].announce(content, small)


def test_the_range_is_the_rules_own():
    rule = quantile_clipping(config_of("client", "quantile"))
    assert (rule.smallest, rule.largest) == (0.05 / CLIP_RANGE, 0.05 * CLIP_RANGE)
    assert quantile_clipping(config_of("client")) is None


# What is refused.


def test_adaptive_clipping_is_refused_in_mode_local():
    with pytest.raises(ConfigError, match="clipping quantile needs a secure sum"):
        config_of("local", "quantile")


def test_several_local_steps_are_refused_in_mode_distributed():
    with pytest.raises(ConfigError, match="local_steps must be 1 in mode distributed"):
        config_of("distributed", training={"local_steps": 2})


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_noise_in_the_ring_does_not_go_with_ckks(mode):
    with pytest.raises(FedptError, match="ckks"):
        config_of(mode, federation={"aggregator": "ckks"})


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, math.nan])
def test_a_corrupt_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="corrupt_fraction"):
        config_of(privacy={"corrupt_fraction": fraction})


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_colluders_that_leave_no_honest_survivor_are_refused_with_a_hint(mode, small):
    config = config_of(mode, privacy={"corrupt_fraction": 0.4}, federation={"minimum_survivors": 2})
    with pytest.raises(PrivacyError, match="nobody whose noise counts") as caught:
        mechanism_of(config, small, 1.0)
    assert "--corrupt-fraction" in caught.value.hint


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_more_colluders_than_secure_aggregation_withstands_are_refused(mode, small):
    """Of five clients, two: with three, a malicious server opens two sums whose difference has next to no noise."""
    assert withstood(5) == 2
    mechanism_of(config_of(mode, privacy={"corrupt_fraction": 0.4}), small, 1.0)
    with pytest.raises(PrivacyError, match="withstands 2") as caught:
        mechanism_of(config_of(mode, privacy={"corrupt_fraction": 0.41}), small, 1.0)
    assert "--corrupt-fraction 0.4" in caught.value.hint


@pytest.mark.parametrize("cohort", range(3, 200))
def test_what_is_withstood_is_what_the_clients_policy_demands(cohort):
    """2t > n + colluders, with the threshold that rounds use."""
    threshold = default_threshold(cohort)
    assert 2 * threshold > cohort + withstood(cohort)
    assert not 2 * threshold > cohort + withstood(cohort) + 1


@pytest.mark.parametrize(
    ("mode", "delta", "units"), [("local", 0.1, 10), ("distributed", 0.02, 50), ("client", 0.2, 5)]
)
def test_delta_must_be_below_one_over_the_units_of_the_mode(mode, delta, units):
    """The largest client's records, all clients' records, the clients."""
    records = dict.fromkeys(IDS, 10)
    with pytest.raises(PrivacyError, match="not below 1/n") as caught:
        require_meaningful_delta(config_of(mode, privacy={"delta": delta}), records)
    # The boundary is where the count is, and the count stays untold.
    assert delta * units >= 1 > delta * 0.9 * units
    assert str(units) not in caught.value.message.replace(f"{delta:g}", "")
    below = config_of(mode, privacy={"delta": delta * 0.9})
    require_meaningful_delta(below, records)
