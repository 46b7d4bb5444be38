"""The statement says the largest epsilon, never rounds it down, and promises nothing where nothing holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fedpt_secure.privacy import GaussianSteps, RingMechanism, epsilon_spent, local_statement, ring_statement

ONCE, TWICE = GaussianSteps(2.0, 1.0, 1), GaussianSteps(2.0, 1.0, 2)


def statement(histories, private=True):
    return local_statement(histories, delta=1e-5, clip_norm=0.1, noise_is_private=private)


def test_the_runs_epsilon_is_that_of_the_client_that_was_used_most():
    made = statement({"a": (ONCE,), "b": (TWICE,), "c": ()})
    worst = epsilon_spent((TWICE,), delta=1e-5)
    assert worst <= made.epsilon <= worst + 1e-3
    assert made.steps == 2


def test_nothing_released_costs_nothing():
    made = statement({"a": ()})
    assert made.epsilon == 0.0
    assert made.private


def test_no_noise_and_noise_from_a_seed_promise_nothing():
    bare = statement({"a": (ONCE,), "b": (GaussianSteps(0.0, 1.0, 1),)})
    seeded = statement({"a": (ONCE,)}, private=False)
    for made in (bare, seeded):
        assert not made.private
        assert made.epsilon is None
        assert made.claim().startswith("NOT PRIVATE")


def test_the_claim_names_epsilon_delta_unit_neighbours_and_adversary():
    made = statement({"a": (ONCE,)})
    claim = made.claim()
    for part in (f"epsilon <= {made.epsilon}", "delta = 1e-05", made.unit, made.neighbouring, made.adversary):
        assert part in claim


def test_secrecy_of_the_sample_is_assumed_only_where_there_is_a_sample():
    whole = statement({"a": (ONCE,)})
    sampled = statement({"a": (GaussianSteps(2.0, 0.5, 1),)})
    assert not any("sampled" in item for item in whole.assumptions)
    assert any("sampled" in item for item in sampled.assumptions)


def test_it_is_json_with_a_versioned_schema():
    content = statement({"a": (ONCE,)}).to_json()
    assert json.loads(json.dumps(content, allow_nan=False))["schema"] == "fedpt-secure/privacy/2"
    assert math.isfinite(content["epsilon"])


# Noise born in pieces: at least seven survivors of a cohort of nine, five of whom may collude.

CORRUPT = 5
RING = RingMechanism.plan(
    noise_multiplier=3.0, honest_shares=2, cohort=9, dimension=100, coordinate_bound=16.0, ring_bits=32
)


def ring(rounds, survivors, *, mechanism=RING, **changes):
    arguments = {
        "mechanism": mechanism,
        "by_client": False,
        "sampling_rate": 1.0,
        "delta": 1e-5,
        "clip_norm": "0.1",
        "corrupt_clients": CORRUPT,
        "noise_is_private": True,
    }
    return ring_statement(rounds, survivors=survivors, **{**arguments, **changes})


def cost(*shares):
    """Epsilon of one client's rounds, given how many honest shares each sum held."""
    return epsilon_spent(tuple(GaussianSteps(RING.noise_multiplier(count), 1.0, 1) for count in shares), delta=1e-5)


def by_adversary(made):
    return {(item.adversary, item.colluding_clients): item.epsilon for item in made.guarantees}


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3)])
def test_clients_that_cost_the_same_are_no_trouble(counts):
    """Without noise every history costs infinity, however long it is."""
    silent = replace(RING, share_sigma=0)
    made = ring({str(count): list(range(count)) for count in counts}, {0: 9}, mechanism=silent)
    assert made.epsilon is None
    assert not made.private


def test_there_is_one_guarantee_for_each_adversary_and_the_headline_is_the_largest():
    made = ring({"a": [0, 1], "b": [0]}, {0: 9, 1: 7})
    assert list(by_adversary(made)) == [
        ("outsider", 0),
        ("server", 0),
        ("server_with_clients", 1),
        ("server_with_clients", 2),
        ("server_with_clients", 4),
        ("server_with_clients", 5),
        ("malicious_server_with_clients", 5),
    ]
    epsilons = [item.epsilon for item in made.guarantees]
    assert epsilons == sorted(epsilons)
    assert made.epsilon == max(epsilons) == epsilons[-1]


@pytest.mark.parametrize("colluding", [0, 1, 2, 4, 5])
def test_a_curious_servers_epsilon_is_that_of_the_survivors_who_do_not_collude(colluding):
    made = ring({"a": [0, 1]}, {0: 9, 1: 7})
    exact = cost(9 - colluding, 7 - colluding)
    name = "server" if colluding == 0 else "server_with_clients"
    assert exact <= by_adversary(made)[name, colluding] <= exact + 1.1e-3


def test_the_malicious_servers_epsilon_is_that_of_the_fewest_honest_survivors_whatever_was_seen():
    for survivors in ({0: 9, 1: 9}, {0: 7, 1: 7}, {}):
        made = ring({"a": [0, 1]}, survivors)
        assert cost(2, 2) <= made.epsilon <= cost(2, 2) + 1.1e-3


def test_a_round_that_was_counted_but_not_completed_costs_its_worst():
    made = ring({"a": [0, 1]}, {0: 9})
    assert cost(9, 2) <= by_adversary(made)["server", 0] <= cost(9, 2) + 1.1e-3


def test_each_guarantee_is_that_of_the_client_it_is_worst_for():
    """Against outsiders the one round with few survivors costs more than two with many."""
    alone = ring({"a": [2]}, {0: 9, 1: 9, 2: 7})
    both = ring({"a": [2], "b": [0, 1]}, {0: 9, 1: 9, 2: 7})
    expected = max(cost(7), cost(9, 9))
    assert expected <= by_adversary(both)["outsider", 0] <= expected + 1.1e-3
    assert by_adversary(alone)["outsider", 0] <= by_adversary(both)["outsider", 0]
    assert both.steps == 2


def test_without_colluders_there_is_no_row_for_them():
    made = ring({"a": [0]}, {0: 9}, corrupt_clients=0)
    assert [item.adversary for item in made.guarantees] == ["outsider", "server", "malicious_server_with_clients"]


@pytest.mark.parametrize("broken", [{"noise_is_private": False}, {"mechanism": replace(RING, share_sigma=0)}])
def test_noise_that_is_no_secret_or_none_promises_nothing_to_anybody(broken):
    made = ring({"a": [0]}, {0: 9}, **broken)
    assert not made.private
    assert made.epsilon is None
    assert all(item.epsilon is None for item in made.guarantees)
    assert made.claim().startswith("NOT PRIVATE")
    json.dumps(made.to_json(), allow_nan=False)


def test_nothing_released_in_the_ring_costs_nothing():
    made = ring({"a": []}, {})
    assert made.epsilon == 0.0
    assert {item.epsilon for item in made.guarantees} == {0.0}


def test_the_unit_and_the_neighbours_are_the_modes_own():
    record, client = ring({"a": [0]}, {0: 9}), ring({"a": [0]}, {0: 9}, by_client=True)
    assert record.unit == "single record of a client"
    assert "one record" in record.neighbouring
    assert client.unit == "client, with all its records"
    assert "takes part either way" in client.neighbouring
    assert any("k records" in item for item in record.not_covered)
    assert not any("k records" in item for item in client.not_covered)


def test_figures_from_models_without_privacy_are_said_not_to_be_covered():
    local = statement({"a": (ONCE,)})
    for made in (local, ring({"a": [0]}, {0: 9}), ring({"a": [0]}, {0: 9}, by_client=True)):
        assert any("ceiling" in item and "without privacy" in item for item in made.not_covered)


def test_what_the_proof_assumes_is_said():
    whole, sampled = ring({"a": [0]}, {0: 9}), ring({"a": [0]}, {0: 9}, sampling_rate=0.5)
    for made in (whole, sampled):
        text = " ".join(made.assumptions)
        for part in ("at most 5 collude", "secure aggregation holds", "floating-point error"):
            assert part in text
    assert not any("sampled" in item for item in whole.assumptions)
    assert any("sampled" in item for item in sampled.assumptions)
    assert sampled.epsilon < whole.epsilon


def test_the_figures_are_those_against_the_strongest_adversary():
    made = ring({"a": [0, 1], "b": [0]}, {0: 9, 1: 9})
    assert made.noise_multiplier == RING.noise_multiplier(2)
    assert (made.steps, made.sampling_rate) == (2, 1.0)
    assert "at least 3" in made.mechanism
    assert any("as few as 7 survivors" in item.sees for item in made.guarantees)
