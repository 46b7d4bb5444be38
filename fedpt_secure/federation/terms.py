"""What a run's server and clients agree on before the first round, from public numbers alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import SYSTEM_RANDOM, InsecureDeterministicBytes, RandomBytes
from fedpt_secure.data.simulation import simulation_key
from fedpt_secure.errors import PrivacyError
from fedpt_secure.federation.client import ClientRandomness, ClientTerms
from fedpt_secure.federation.mechanisms import build_mechanism
from fedpt_secure.federation.schedule import participations
from fedpt_secure.federation.tiers import TrainingPlan
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import (
    UNITS,
    Budget,
    GaussianSteps,
    InsecureDeterministicRandom,
    SecureRandom,
    calibrate_noise,
)

Schedule = tuple[tuple[str, ...], ...]


def config_digest(config: RunConfig) -> bytes:
    """SHA-256 of the resolved configuration: what server and clients agree on before the first round."""
    return hashlib.sha256(config.to_toml().encode()).digest()


def agreed_terms(
    config: RunConfig,
    client_ids: Sequence[str],
    schedule: Schedule,
    *,
    run_id: bytes,
    small: SmallLM,
    noise_multiplier: float,
) -> ClientTerms:
    """The terms of a run: the same at the server and at every client, or their messages do not fit together.

    Args:
        config: settled for the population (`RunConfig.for_population`).
        client_ids: everybody, whether or not some round asks for them.
        schedule: the cohorts of all rounds.
        noise_multiplier: what `calibrate` says.

    Raises:
        PrivacyError: the ring is too small for the noise, or no survivor is sure to be honest.
        ConfigError: a tier would train more layers than have an adapter.
    """
    plan = TrainingPlan.of(config, client_ids, small.adapted_layers)
    mechanism = build_mechanism(config, noise_multiplier=noise_multiplier, dimension=small.dimension)
    digest = _with_cost(plan.digest(config_digest(config)), mechanism.cost)
    return ClientTerms(run_id, config, digest, mechanism, schedule, plan)


def _with_cost(digest: bytes, cost: GaussianSteps) -> bytes:
    """Bind what a round costs: a program that calibrates otherwise has other terms, and nobody trains on two.

    Six digits, so that the last bits of other numerical libraries do not part people.
    """
    told = f"{cost.noise_multiplier:.6g} {cost.sampling_rate:.6g} {cost.steps}"
    return hashlib.sha256(b"fedpt-secure/terms/1" + digest + told.encode()).digest()


def calibrate(config: RunConfig, schedule: Schedule) -> float:
    """The noise multiplier that keeps every client within the run's epsilon, or a refusal before anything is trained.

    In the modes whose noise is born in pieces it is the multiplier against the strongest adversary that the promise
    names: the server together with as many clients as the configuration tolerates.

    Args:
        schedule: the cohorts of all rounds; what counts is how many any client is in.

    Raises:
        PrivacyError: the promise cannot be met.
    """
    privacy = config.privacy
    if math.isinf(privacy.epsilon):
        return 0.0
    most_rounds = max(participations(schedule).values())
    return calibrate_noise(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=privacy.sampling_rate,
        steps=most_rounds * (config.training.local_steps if privacy.mode == "local" else 1),
    )


def require_meaningful_delta(config: RunConfig, records: Mapping[str, int]) -> None:
    """Refuse a promise that publishing one unit outright would keep.

    Args:
        records: training records by client: of all clients; or, where nobody knows those, one entry each for a client's
            own number and for a public bound of everybody else's.

    Raises:
        PrivacyError: delta is not below one over the number of units among which one could be published.
    """
    privacy = config.privacy
    if math.isinf(privacy.epsilon):
        return
    units, what = {
        "local": (max(records.values()), "the largest client's records"),
        "distributed": (sum(records.values()), "all clients' records"),
        "client": (len(records), "the number of clients"),
    }[privacy.mode]
    if privacy.delta * units >= 1:
        raise PrivacyError(
            # The count itself is private: only its order of magnitude is told.
            f"delta {privacy.delta:g} is not below 1/n, n being {what}: such a promise allows publishing one outright",
            hint=f"--delta 1e-{len(str(units)) + 1}",
        )


def first_budget(config: RunConfig) -> Budget:
    """The budget of a ledger that the run begins. One that is there already has its owner's."""
    privacy = config.privacy
    promised = math.inf if config.insecure_deterministic else privacy.epsilon
    return Budget(privacy.budget_epsilon or promised, privacy.delta, UNITS[privacy.mode])


def client_randomness(config: RunConfig, client_id: str) -> ClientRandomness:
    """Fresh secure randomness, or, only where the run is marked as not private, randomness from the seed.

    Keys and masks are always fresh: they cancel, so a reproducible result does not need them repeated.
    """
    if not config.insecure_deterministic:
        return ClientRandomness(noise=lambda round_index: SecureRandom(), rounding=lambda round_index: SYSTEM_RANDOM)

    def rounding(round_index: int) -> RandomBytes:
        return InsecureDeterministicBytes(simulation_key("rounding", config.seed, client_id, str(round_index)))

    return ClientRandomness(
        noise=lambda round_index: InsecureDeterministicRandom(config.seed, "noise", client_id, round_index),
        rounding=rounding,
    )
