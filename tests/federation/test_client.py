"""A client takes part on the agreed terms only, whatever the server says."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import RunConfig, build
from fedpt_secure.crypto import Identity, Roster
from fedpt_secure.errors import LedgerError, RoundError
from fedpt_secure.federation import ClientTerms, ClientWorker
from fedpt_secure.federation.announcement import Announcement
from fedpt_secure.federation.local_engine import draw_dropouts, run_round
from fedpt_secure.federation.mechanisms import build_mechanism
from fedpt_secure.federation.server import AggregationServer
from fedpt_secure.federation.terms import client_randomness, config_digest
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import Budget, GaussianSteps, Ledger, SmallExample
from fedpt_secure.progress import SILENT

CONFIG = build(
    RunConfig,
    {
        "federation": {"rounds": 2, "cohort": 5},
        "privacy": {"epsilon": 4, "sampling_rate": 1.0},
        "lora": {"rank": 1},
        "insecure_deterministic": True,
    },
)
IDS = tuple(f"client {index}" for index in range(5))
RUN_ID = bytes(16)
NOISE = 2.0


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(32), "tiny")
    return SmallLM(base, CONFIG.lora, seed=0, device=torch.device("cpu"))


def mechanism_for(small):
    return build_mechanism(CONFIG, noise_multiplier=NOISE, dimension=small.dimension)


@pytest.fixture
def federation(tmp_path, small):
    """Workers and roster of five clients; their ledgers lie in `tmp_path`."""
    identities = {client: Identity.generate() for client in IDS}
    roster = Roster({client: identity.verify_key_bytes for client, identity in identities.items()})
    terms = ClientTerms(RUN_ID, CONFIG, config_digest(CONFIG), mechanism_for(small), (IDS, IDS))
    workers = {
        client: ClientWorker(
            client,
            [SmallExample((0, 1 + index, 3, 4), 1)] * 3,
            terms=terms,
            identity=identities[client],
            roster=roster,
            ledger=Ledger.create(tmp_path / str(index), budget=Budget(math.inf, 1e-5)),
            randomness=client_randomness(CONFIG, client),
        )
        for index, client in enumerate(IDS)
    }
    return workers, roster


def server_for(roster, small, round_index=0, attempt=0):
    adapter = small.adapter_vector()
    return AggregationServer(
        config=CONFIG,
        config_digest=config_digest(CONFIG),
        run_id=RUN_ID,
        round_index=round_index,
        attempt=attempt,
        cohort=IDS,
        roster=roster,
        adapter=adapter,
        model_digest=small.weights_digest(adapter),
        mechanism=mechanism_for(small),
        clip_norm=CONFIG.privacy.clip_norm,
    )


def altered(announcement, **changes):
    decoded = Announcement.from_bytes(announcement)
    return msgspec.structs.replace(decoded, **changes).to_bytes()


def test_the_aggregate_is_the_mean_of_the_clients_updates(federation, small, tmp_path):
    workers, roster = federation
    aggregate, transcript = run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    assert transcript.survivors == IDS
    updates = [Ledger(tmp_path / str(index)).pending(RUN_ID.hex(), 0) for index in range(5)]
    step = 5 * CONFIG.training.update_bound / (2**31 - 1)  # of the ring's grid
    expected = np.mean(np.clip(updates, -1, 1), axis=0)
    assert np.abs(aggregate.mean_update - expected).max() <= step * 5


@pytest.mark.parametrize("phase", ["advertise", "share_keys", "mask", "confirm", "unmask"])
def test_one_client_may_vanish_before_any_phase(federation, small, phase):
    workers, roster = federation
    aggregate, transcript = run_round(
        server_for(roster, small), workers, small, dropouts={IDS[2]: phase}, progress=SILENT
    )
    assert aggregate is not None
    assert transcript.dropped == {IDS[2]: f"{phase}: vanished"}
    assert (IDS[2] in transcript.survivors) is (phase in ("confirm", "unmask"))


@pytest.mark.parametrize("phase", ["advertise", "share_keys", "mask", "confirm", "unmask"])
def test_below_the_threshold_the_round_is_aborted_and_nothing_is_learned(federation, small, phase):
    workers, roster = federation
    aggregate, transcript = run_round(
        server_for(roster, small), workers, small, dropouts=dict.fromkeys(IDS[:2], phase), progress=SILENT
    )
    assert aggregate is None
    assert transcript.aborted
    assert transcript.survivors == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": bytes(15) + b"x"},
        {"config_digest": bytes(32)},
        {"round_index": 2},
        {"round_index": -1},
        {"ring_bits": 16},
        {"threshold": 2},
        {"minimum_survivors": 2},
        {"cohort": IDS[:4]},
        {"cohort": (*IDS[:4], IDS[3])},
        {"cohort": (*IDS, "stranger")},
        {"adapter": b"1234"},
        {"adapter": b"123"},
        {"protocol": "fedpt-secure/round/0"},
    ],
)
def test_other_terms_than_agreed_are_refused(federation, small, changes):
    workers, roster = federation
    announcement = altered(server_for(roster, small).announcement, **changes)
    with pytest.raises(RoundError):
        workers[IDS[0]].announce(announcement, small)


def test_an_adapter_that_is_not_finite_is_refused(federation, small):
    workers, roster = federation
    poisoned = np.full(small.dimension, np.nan, dtype="<f4").tobytes()
    with pytest.raises(RoundError, match="not finite"):
        workers[IDS[0]].announce(altered(server_for(roster, small).announcement, adapter=poisoned), small)


def test_an_adapter_no_honest_server_would_send_is_refused(federation, small):
    workers, roster = federation
    huge = np.full(small.dimension, 1e5, dtype="<f4").tobytes()
    with pytest.raises(RoundError, match="above 10000"):
        workers[IDS[0]].announce(altered(server_for(roster, small).announcement, adapter=huge), small)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 40, b"\x93\x01\x02\x03"])
def test_garbage_is_refused(federation, small, content):
    workers, _ = federation
    with pytest.raises(RoundError, match="cannot be read"):
        workers[IDS[0]].announce(content, small)


def test_a_client_given_other_weights_drops_out_of_the_sum(federation, small):
    """Model inconsistency (Pasquini et al. 2022): its keys are signed for another model, so nobody masks with it."""
    workers, roster = federation
    server = server_for(roster, small)
    other = np.ones(small.dimension, dtype="<f4").tobytes()
    honest = workers[IDS[0]].announce

    def announce(content, model):
        return honest(altered(content, adapter=other), model)

    workers[IDS[0]].announce = announce
    aggregate, transcript = run_round(server, workers, small, dropouts={}, progress=SILENT)
    assert aggregate is None or IDS[0] not in transcript.survivors
    assert any(IDS[0] in line for line in transcript.rejected)


def test_a_round_once_settled_is_never_trained_again(federation, small):
    workers, roster = federation
    run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    for worker in workers.values():
        worker.settle(1)
    aggregate, transcript = run_round(
        server_for(roster, small, attempt=1), workers, small, dropouts={}, progress=SILENT
    )
    assert aggregate is None
    assert all("already" in reason for reason in transcript.dropped.values())
    assert all(len(worker.releases) == 1 for worker in workers.values())


def test_a_client_over_its_budget_declines_before_training(federation, small, tmp_path, monkeypatch):
    """Every client has spent nearly all of its epsilon elsewhere."""
    workers, roster = federation
    for index in range(5):
        book = Ledger(tmp_path / str(index))
        book.set_budget(Budget(4.0, 1e-5))
        book.release("elsewhere", 0, GaussianSteps(1.1, 1.0, 1), np.zeros(1), mode="local", noise_is_private=True)
    monkeypatch.setattr(
        "fedpt_secure.federation.mechanisms.train_locally", lambda *args, **kwargs: pytest.fail("trained all the same")
    )
    aggregate, transcript = run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    assert aggregate is None
    assert len(transcript.dropped) == 5
    assert set(transcript.dropped.values()) == {"advertise: declined (budget)"}
    assert transcript.declined == dict.fromkeys(IDS, "budget")
    assert transcript.aborted.endswith("; of 5 clients 5 declined: 5 for budget")


def test_a_finite_budget_allows_no_noise_from_a_seed(federation, small, tmp_path):
    """The fixture's noise comes from a seed: whoever knows it can take it off again."""
    workers, roster = federation
    Ledger(tmp_path / "0").set_budget(Budget(1000.0, 1e-5))
    _, transcript = run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    assert transcript.declined == {IDS[0]: "budget"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": (*IDS, "client 5")}, "another cohort"),
        ({"cohort": IDS[:4]}, "another cohort"),
        ({"threshold": 5}, "agreed were 4 and 4"),
        ({"minimum_survivors": 3}, "agreed were 4 and 4"),
    ],
)
def test_the_server_does_not_choose_cohort_threshold_or_survivors(federation, small, changes, message):
    """The noise of modes whose noise is born in pieces was calibrated for the agreed ones."""
    workers, roster = federation
    with pytest.raises(RoundError, match=message):
        workers[IDS[0]].announce(altered(server_for(roster, small).announcement, **changes), small)


def test_a_simulated_disk_failure_stops_the_run_instead_of_looking_like_a_dropout(federation, small, tmp_path):
    workers, roster = federation
    (tmp_path / "0" / "ledger.sqlite").write_bytes(b"scrambled" * 1000)
    with pytest.raises(LedgerError, match="cannot be used"):
        run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)


def test_an_opened_round_is_not_opened_again_over_other_survivors(federation, small):
    """The difference of two sums over 5 and 4 survivors is one client's bare update; the second never comes to be."""
    workers, roster = federation
    first, _ = run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    assert first is not None
    again = server_for(roster, small, attempt=1)
    second, transcript = run_round(again, workers, small, dropouts={IDS[4]: "mask"}, progress=SILENT)
    assert second is None
    assert all("give single updates away" in reason for reason in transcript.dropped.values())


def test_without_the_memory_of_rounds_the_difference_of_two_sums_is_one_clients_update(
    federation, small, tmp_path, monkeypatch
):
    """The broken variant, which shows what the memory is for."""
    workers, roster = federation
    monkeypatch.setattr(Ledger, "begin_session", lambda *args: None)
    monkeypatch.setattr(Ledger, "open_round", lambda *args: None)
    first, _ = run_round(server_for(roster, small), workers, small, dropouts={}, progress=SILENT)
    again = server_for(roster, small, attempt=1)
    second, _ = run_round(again, workers, small, dropouts={IDS[4]: "mask"}, progress=SILENT)
    stolen = 5 * first.mean_update - 4 * second.mean_update
    update = Ledger(tmp_path / "4").pending(RUN_ID.hex(), 0)
    assert np.abs(stolen - update).max() < 1e-6


def test_dropouts_are_drawn_at_the_stated_rate_and_repeat_with_the_seed():
    """10,000 draws at 0.1; 5 standard deviations, false alarm 6e-7."""
    cohort = [f"c{index}" for index in range(10_000)]
    drawn = draw_dropouts(cohort, dropout=0.1, seed=1, round_index=0)
    assert abs(len(drawn) - 1000) < 5 * 30
    assert drawn == draw_dropouts(cohort, dropout=0.1, seed=1, round_index=0)
    assert set(drawn.values()) == {"advertise", "share_keys", "mask", "confirm", "unmask"}
    assert draw_dropouts(cohort, dropout=0.0, seed=1, round_index=0) == {}


@pytest.mark.parametrize("when", ["before keys are shared", "with a share that does not open"])
def test_a_round_that_cannot_be_masked_is_not_paid_for(when, federation, small, tmp_path):
    """A malicious server that asks too early, or a malicious client that seals garbage, spends nobody's privacy."""
    workers, roster = federation
    server = server_for(roster, small)
    for client, worker in workers.items():
        server.receive("advertise", client, worker.announce(server.announcement, small))
    inbox = b""
    if when != "before keys are shared":
        directory = server.publish_keys()
        for client, worker in workers.items():
            server.receive("share_keys", client, worker.share_keys(directory))
        spoiled = bytearray(server.route_shares()[IDS[0]])
        spoiled[-1] ^= 1
        inbox = bytes(spoiled)
    with pytest.raises(RoundError):
        workers[IDS[0]].train_and_mask(inbox, small)
    assert Ledger(tmp_path / "0").history() == ()
    assert workers[IDS[0]].releases == ()
