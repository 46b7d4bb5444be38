"""The simulated population: every client's worker, built from the prepared text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import SYSTEM_RANDOM, Identity, InsecureDeterministicBytes, RandomBytes, Roster
from fedpt_secure.data import FederatedText
from fedpt_secure.data.simulation import simulation_key
from fedpt_secure.errors import PrivacyError
from fedpt_secure.federation.audit_record import AuditRecorder
from fedpt_secure.federation.client import ClientRandomness, ClientTerms, ClientWorker
from fedpt_secure.federation.ledgers import ledger_directories
from fedpt_secure.federation.mechanisms import RoundMechanism
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.tiers import EVERYTHING, TrainingPlan
from fedpt_secure.privacy import (
    UNITS,
    Budget,
    InsecureDeterministicRandom,
    Ledger,
    SecureRandom,
    SmallExample,
    calibrate_noise,
)


@dataclass(frozen=True, slots=True)
class Population:
    """All clients of a run and the keys they know each other by.

    Attributes:
        workers: client id -> worker, for the clients that some round asks.
        roster: every client's verify key, as distributed out of band.
        terms: what all of them agreed to.
    """

    workers: Mapping[str, ClientWorker]
    roster: Roster
    terms: ClientTerms


def config_digest(config: RunConfig) -> bytes:
    """SHA-256 of the resolved configuration: what server and clients agree on before the first round."""
    return hashlib.sha256(config.to_toml().encode()).digest()


def calibrate(config: RunConfig, *, most_rounds: int, records: Mapping[str, int]) -> float:
    """The noise multiplier that keeps every client within the run's epsilon, or a refusal before anything is trained.

    In the modes whose noise is born in pieces it is the multiplier against the strongest adversary that the promise
    names: the server together with as many clients as the configuration tolerates.

    Args:
        most_rounds: that any client takes part in.
        records: training records by client.

    Raises:
        PrivacyError: the promise is meaningless (delta too large) or cannot be met.
    """
    privacy = config.privacy
    if privacy.epsilon == float("inf"):
        return 0.0
    # delta must be below one over the number of units among which one could be published outright.
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
    return calibrate_noise(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=privacy.sampling_rate,
        steps=most_rounds * (config.training.local_steps if privacy.mode == "local" else 1),
    )


def build_population(
    config: RunConfig,
    text: FederatedText,
    examples: Mapping[str, Sequence[SmallExample]],
    *,
    schedule: tuple[tuple[str, ...], ...],
    run_id: bytes,
    mechanism: RoundMechanism,
    directory: RunDirectory,
    recorder: AuditRecorder,
    new: bool,
    plan: TrainingPlan = EVERYTHING,
) -> Population:
    """Give every client that will be asked its identity, ledger and noise source.

    Args:
        schedule: the cohorts of all rounds.
        recorder: told what clients release.
        plan: who trains which part of the adapter.
        new: the run has no checkpoint yet, so ledgers may be begun; later a missing one is an error.

    Raises:
        LedgerError: a client's ledger is missing or damaged, or lies among ledgers of other records.
    """
    terms = ClientTerms(run_id, config, plan.digest(config_digest(config)), mechanism, schedule, plan)
    identities = {client: Identity.generate() for client in set().union(*schedule)}
    privacy = config.privacy
    # Only where there is no ledger yet: one that is there has its owner's budget.
    promised = math.inf if config.insecure_deterministic else privacy.epsilon
    first_budget = Budget(privacy.budget_epsilon or promised, privacy.delta, UNITS[privacy.mode])
    places = ledger_directories(config, text, directory, new=new)

    def ledger(client_id: str) -> Ledger:
        place = places[client_id]
        return Ledger.create(place, budget=first_budget) if new else Ledger(place)

    roster = Roster({client_id: identity.verify_key_bytes for client_id, identity in identities.items()})
    workers = {
        client.client_id: ClientWorker(
            client.client_id,
            examples[client.client_id],
            terms=terms,
            identity=identities[client.client_id],
            roster=roster,
            ledger=ledger(client.client_id),
            randomness=client_randomness(config, client.client_id),
            watch_release=partial(recorder.release, client.client_id),
        )
        for client in text.clients
        if client.client_id in identities
    }
    return Population(workers, roster, terms)


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
