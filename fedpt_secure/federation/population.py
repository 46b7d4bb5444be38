"""The simulated population: every client's worker, built from the prepared text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedpt_secure.crypto import Identity, Roster
from fedpt_secure.data import FederatedText
from fedpt_secure.federation.audit_record import AuditRecorder
from fedpt_secure.federation.client import ClientTerms, ClientWorker
from fedpt_secure.federation.ledgers import ledger_directories
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.terms import client_randomness, first_budget
from fedpt_secure.privacy import Ledger, SmallExample


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


def build_population(
    terms: ClientTerms,
    text: FederatedText,
    examples: Mapping[str, Sequence[SmallExample]],
    *,
    directory: RunDirectory,
    recorder: AuditRecorder,
    new: bool,
) -> Population:
    """Give every client that will be asked its identity, ledger and noise source.

    Args:
        terms: what all of them agree to.
        recorder: told what clients release.
        new: the run has no checkpoint yet, so ledgers may be begun; later a missing one is an error.

    Raises:
        LedgerError: a client's ledger is missing or damaged, or lies among ledgers of other records.
    """
    config = terms.config
    identities = {client: Identity.generate() for client in set().union(*terms.schedule)}
    budget = first_budget(config)
    places = ledger_directories(config, text, directory, new=new)

    def ledger(client_id: str) -> Ledger:
        place = places[client_id]
        return Ledger.create(place, budget=budget) if new else Ledger(place)

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
