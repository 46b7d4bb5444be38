"""The simulated population: clients whose state lies on disk, and who are in memory while a round asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedpt_secure.crypto import Identity, Roster
from fedpt_secure.data import FederatedText
from fedpt_secure.federation.audit_record import AuditRecorder
from fedpt_secure.federation.client import ClientTerms, ClientWorker
from fedpt_secure.federation.ledgers import ledger_directories
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.terms import client_randomness, first_budget
from fedpt_secure.privacy import Ledger, Release, SmallExample

Examples = Callable[[str], Sequence[SmallExample]]
"""The training records of a client, by its id, as token ids."""

KEPT_RECORDS = 16_384
"""Most records whose token ids stay in memory between rounds, all clients together; some 5 kB each at 128 tokens."""

_REMEMBERED_SIGNATURES = 4096
"""Below 2 MiB; two of each client are verified by all others of a round."""


class Population:
    """All clients that some round asks, and the keys they know each other by.

    What is held of a client between its rounds are its keys and, of the first `KEPT_RECORDS` that are asked for, its
    records as token ids; its ledger is on disk, and other records are cut to token ids anew. So memory follows the
    cohort, not the population (docs/scale.md).

    Attributes:
        roster: every client's verify key, as distributed out of band.
        terms: what all of them agreed to.
    """

    def __init__(
        self,
        terms: ClientTerms,
        identities: Mapping[str, Identity],
        ledgers: Mapping[str, Path],
        examples: Examples,
        recorder: AuditRecorder,
    ) -> None:
        """Use `build_population`, which has the ledgers begun.

        Args:
            identities: of the clients that some round asks.
            ledgers: where each of them keeps its ledger.
        """
        self.terms = terms
        verify_keys = {client_id: identity.verify_key_bytes for client_id, identity in identities.items()}
        self.roster = Roster(verify_keys, remembered=_REMEMBERED_SIGNATURES)
        self._identities = identities
        self._ledgers = ledgers
        self._examples = examples
        self._recorder = recorder
        self._kept: dict[str, Sequence[SmallExample]] = {}

    def cohort(self, client_ids: Iterable[str]) -> dict[str, ClientWorker]:
        """Workers for one round.

        Raises:
            LedgerError: a client's ledger is missing or damaged.
        """
        return {
            client_id: ClientWorker(
                client_id,
                self._token_ids(client_id),
                terms=self.terms,
                identity=self._identities[client_id],
                roster=self.roster,
                ledger=Ledger(self._ledgers[client_id]),
                randomness=client_randomness(self.terms.config, client_id),
                watch_release=partial(self._recorder.release, client_id),
            )
            for client_id in client_ids
        }

    def _token_ids(self, client_id: str) -> Sequence[SmallExample]:
        examples = self._kept.get(client_id)
        if examples is None:
            examples = self._examples(client_id)
            if sum(map(len, self._kept.values())) + len(examples) <= KEPT_RECORDS:
                self._kept[client_id] = examples
        return examples

    def releases(self) -> dict[str, tuple[Release, ...]]:
        """What each client's ledger says its data was used for in this run.

        Raises:
            LedgerError: a client's ledger is missing or damaged.
        """
        run_id = self.terms.run_id.hex()
        return {client_id: Ledger(place).releases(run_id) for client_id, place in self._ledgers.items()}

    def settle(self, rounds_done: int, client_ids: Iterable[str]) -> None:
        """The results of all rounds below `rounds_done` are durable: these clients drop what they kept for them.

        Args:
            client_ids: those that no round asks have nothing to drop.

        Raises:
            LedgerError: a client's ledger is missing or damaged.
        """
        for client_id in client_ids:
            if client_id in self._ledgers:
                Ledger(self._ledgers[client_id]).settle(self.terms.run_id.hex(), rounds_done=rounds_done)


def build_population(
    terms: ClientTerms,
    text: FederatedText,
    examples: Examples,
    *,
    directory: RunDirectory,
    recorder: AuditRecorder,
    new: bool,
) -> Population:
    """Give every client that will be asked its identity and ledger.

    Args:
        terms: what all of them agree to.
        recorder: told what clients release.
        new: the run has no checkpoint yet, so ledgers may be begun; later a missing one is an error.

    Raises:
        LedgerError: a client's ledger is missing or damaged, or lies among ledgers of other records.
    """
    asked = set().union(*terms.schedule)
    places = ledger_directories(terms.config, text, directory, new=new)
    ledgers = {client.client_id: places[client.client_id] for client in text.clients if client.client_id in asked}
    budget = first_budget(terms.config)
    for place in ledgers.values():
        if new:
            Ledger.create(place, budget=budget)
        else:
            Ledger(place)  # one that is missing or damaged is found now, not in the round that asks for it
    return Population(terms, {client_id: Identity.generate() for client_id in ledgers}, ledgers, examples, recorder)
