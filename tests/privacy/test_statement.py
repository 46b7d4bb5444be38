"""The statement says the largest epsilon, never rounds it down, and promises nothing where nothing holds."""

from __future__ import annotations

import json
import math

from fedpt_secure.privacy import GaussianSteps, epsilon_spent, local_statement

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
    assert json.loads(json.dumps(content, allow_nan=False))["schema"] == "fedpt-secure/privacy/1"
    assert math.isfinite(content["epsilon"])
