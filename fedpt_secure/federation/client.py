"""One client: the only place where its records, its keys and its bare update exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.config import FederationConfig, RunConfig, withstood
from fedpt_secure.crypto import (
    ClientPolicy,
    Identity,
    RandomBytes,
    Roster,
    RoundContext,
    RoundReplayed,
    default_threshold,
)
from fedpt_secure.errors import AlreadyReleased, RoundError
from fedpt_secure.federation.aggregation import AggregationClient, aggregation_of
from fedpt_secure.federation.announcement import Announcement, agreed_digest
from fedpt_secure.federation.mechanisms import RoundMechanism, quantile_clipping
from fedpt_secure.federation.protocol_errors import as_round_error
from fedpt_secure.federation.tiers import EVERYTHING, TrainingPlan
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import (
    Ledger,
    NoiseSource,
    Release,
    SmallExample,
)

LARGEST_ADAPTER_ENTRY = 1e4
"""No honest adapter comes near; larger ones can make a forward pass overflow on some records and not on others."""


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """What a client agreed to before the run; nothing the server says later changes it.

    Attributes:
        run_id: of the run it joined.
        config: the run's configuration.
        config_digest: SHA-256 of it, and of everybody's tier (`TrainingPlan.digest`).
        mechanism: with noise calibrated to the budget over all rounds the client may be in.
        schedule: who takes part in which round; public, fixed before the first one. The server does not choose.
        plan: who trains which part of the adapter in which round; public and fixed likewise.
    """

    run_id: bytes
    config: RunConfig
    config_digest: bytes
    mechanism: RoundMechanism
    schedule: tuple[tuple[str, ...], ...]
    plan: TrainingPlan = EVERYTHING


@dataclass(frozen=True, slots=True)
class ClientRandomness:
    """Where a client's randomness comes from, by round.

    Attributes:
        noise: the source of a round's noise and sampling.
        rounding: the source of the encoding's unbiased rounding.
    """

    noise: Callable[[int], NoiseSource]
    rounding: Callable[[int], RandomBytes]


class ClientWorker:
    """A client over a whole run. Methods take and return the protocol's bytes, one call a phase.

    The order within a round is `announce`, `share_keys`, `train_and_mask`, `confirm`, `unmask`, then `discard`,
    whatever the round's end, and `settle` once the server has made its result durable.
    """

    def __init__(
        self,
        client_id: str,
        examples: Sequence[SmallExample],
        *,
        terms: ClientTerms,
        identity: Identity,
        roster: Roster,
        ledger: Ledger,
        randomness: ClientRandomness,
        watch_release: Callable[[npt.NDArray[Any]], None] = lambda released: None,
    ) -> None:
        """Join a run.

        Args:
            watch_release: told what the client releases, noise and all. For the audit of a simulation; a real client
                has nobody to tell.
        """
        self.client_id = client_id
        self._examples = tuple(examples)
        self._terms = terms
        self._identity = identity
        self._roster = roster
        self._ledger = ledger
        self._randomness = randomness
        self._watch_release = watch_release
        self._announcement: Announcement | None = None
        self._protocol: AggregationClient | None = None

    @property
    def releases(self) -> tuple[Release, ...]:
        """What the ledger says this client's data was used for in this run."""
        return self._ledger.releases(self._terms.run_id.hex())

    def announce(self, content: bytes, small: SmallLM) -> bytes:
        """Check a round's announcement against the terms; answer with signed fresh keys.

        Raises:
            RoundError: the server proposes another run, other constants, or a round this client's policy forbids.
            BudgetExceeded: the client's own budget would be passed; it declines before anybody waits for it.
            AlreadyReleased: it gave its update to an earlier attempt of this round, and must not do so again.
        """
        announcement = Announcement.from_bytes(content)
        terms, federation = self._terms, self._terms.config.federation
        if announcement.run_id != terms.run_id or announcement.config_digest != terms.config_digest:
            raise RoundError("the server announced a round of another run or configuration than the one joined")
        if announcement.ring_bits != federation.ring_bits:
            raise RoundError(
                f"the server wants a ring of {announcement.ring_bits} bits, agreed were {federation.ring_bits}"
            )
        self._check_clip_norm(announcement.clip_norm)
        if not 0 <= announcement.round_index < federation.rounds:
            raise RoundError(f"round {announcement.round_index} is not one of the {federation.rounds} agreed rounds")
        self._check_cohort(announcement)
        vector = announcement.adapter_vector()
        if vector.shape != (small.dimension,):
            raise RoundError(f"announced adapter has {vector.size} entries, the agreed one has {small.dimension}")
        if not (np.isfinite(vector).all() and np.abs(vector).max() <= LARGEST_ADAPTER_ENTRY):
            raise RoundError(f"announced adapter holds entries that are not finite or above {LARGEST_ADAPTER_ENTRY:g}")
        if self._ledger.pending(terms.run_id.hex(), announcement.round_index) is None:
            self._ledger.check(
                terms.mechanism.cost,
                mode=terms.config.privacy.mode,
                noise_is_private=not terms.config.insecure_deterministic,
            )
        with as_round_error(f"client {self.client_id}"):
            context = RoundContext(
                run_id=announcement.run_id,
                round_index=announcement.round_index,
                attempt=announcement.attempt,
                cohort=announcement.cohort,
                roster_digest=self._roster.digest,
                model_digest=agreed_digest(small.weights_digest(vector), terms.config_digest),
                vector_length=terms.mechanism.vector_length,
                ring_bits=announcement.ring_bits,
                threshold=announcement.threshold,
                minimum_survivors=announcement.minimum_survivors,
            )
            protocol = aggregation_of(terms.config).client(
                context=context,
                identity=self._identity,
                client_id=self.client_id,
                roster=self._roster,
                policy=_policy(federation),
                register=_LedgerRegister(self._ledger),
            )
            answer = protocol.advertise()
        self._announcement, self._protocol = announcement, protocol
        return answer

    def share_keys(self, directory: bytes) -> bytes:
        """Verify everybody's signed keys; answer with sealed secret shares."""
        with as_round_error(f"client {self.client_id}"):
            return self._active.share_keys(directory)

    def train_and_mask(self, inbox: bytes, small: SmallLM) -> bytes:
        """Train, count the release in the ledger, then answer with the masked update.

        In mode `local` a round that was interrupted after the release sends the same update again, under fresh masks.

        Raises:
            BudgetExceeded: other work has spent the client's budget since it joined the round; it declines.
            AlreadyReleased: it gave its update to an earlier attempt of this round, and must not do so again.
        """
        announcement = self._announced
        with as_round_error(f"client {self.client_id}"):
            # Whatever is wrong with the round comes out before anything is trained, or spent.
            self._active.open_inbox(inbox)
        released = self._release(announcement, small)
        self._watch_release(released)
        with as_round_error(f"client {self.client_id}"):
            vector = self._terms.mechanism.to_ring(released, self._randomness.rounding(announcement.round_index))
            return self._active.mask(inbox, vector)

    def confirm(self, survivors: bytes) -> bytes:
        """Sign the list of survivors that this client was shown."""
        with as_round_error(f"client {self.client_id}"):
            return self._active.confirm(survivors)

    def unmask(self, confirmations: bytes) -> bytes:
        """If enough clients were shown the same list, reveal one kind of share per peer."""
        with as_round_error(f"client {self.client_id}"):
            return self._active.unmask(confirmations)

    def discard(self) -> None:
        """Leave the round: wipe its keys. The update stays on the client's disk until `settle`."""
        if self._protocol is not None:
            self._protocol.discard()
        self._protocol = self._announcement = None

    def settle(self, rounds_done: int) -> None:
        """The server has made the result of all rounds below `rounds_done` durable: drop their updates."""
        self._ledger.settle(self._terms.run_id.hex(), rounds_done=rounds_done)

    @property
    def _last_round(self) -> int:
        """The last round that asks this client; -1 if none does."""
        schedule = self._terms.schedule
        return next((index for index in reversed(range(len(schedule))) if self.client_id in schedule[index]), -1)

    @property
    def _active(self) -> AggregationClient:
        if self._protocol is None:
            raise RoundError(f"client {self.client_id} is in no round")
        return self._protocol

    @property
    def _announced(self) -> Announcement:
        if self._announcement is None:
            raise RoundError(f"client {self.client_id} is in no round")
        return self._announcement

    def _check_cohort(self, announcement: Announcement) -> None:
        """The noise was calibrated for the agreed cohorts, thresholds and floors: refuse all others."""
        federation = self._terms.config.federation
        if announcement.cohort != self._terms.schedule[announcement.round_index]:
            raise RoundError(
                f"the server announced another cohort than the agreed one for round {announcement.round_index}"
            )
        agreed = (default_threshold(federation.agreed_cohort), federation.agreed_survivors)
        if (announcement.threshold, announcement.minimum_survivors) != agreed:
            raise RoundError(
                f"the server wants threshold {announcement.threshold} and {announcement.minimum_survivors} survivors, "
                f"agreed were {agreed[0]} and {agreed[1]}"
            )

    def _check_clip_norm(self, clip_norm: float) -> None:
        agreed, quantile = self._terms.config.privacy.clip_norm, quantile_clipping(self._terms.config)
        smallest, largest = (agreed, agreed) if quantile is None else (quantile.smallest, quantile.largest)
        # Written so that NaN is refused.
        if not smallest <= clip_norm <= largest:
            raise RoundError(f"the server wants clip norm {clip_norm}, agreed was {smallest:g} to {largest:g}")

    def _release(self, announcement: Announcement, small: SmallLM) -> npt.NDArray[Any]:
        """Train, and count the release; or, where that is safe, what was released before the round was interrupted."""
        run_id, round_index = self._terms.run_id.hex(), announcement.round_index
        mechanism, mode = self._terms.mechanism, self._terms.config.privacy.mode
        before = self._ledger.pending(run_id, round_index)
        if before is not None:
            return before
        small.load_adapter_vector(announcement.adapter_vector())
        noise = self._randomness.noise(round_index)
        part = self._terms.plan.part(self.client_id, round_index)
        released = mechanism.release(small, self._examples, clip_norm=announcement.clip_norm, noise=noise, part=part)
        if round_index >= self._last_round:
            for example in self._examples:  # a simulation's clients share one process: its memory must not add up
                small.forget(example.ids, example.loss_from)
        self._ledger.release(
            run_id,
            round_index,
            mechanism.cost,
            released.astype(np.float64) if mechanism.resendable else None,
            mode=mode,
            noise_is_private=noise.is_private,
        )
        return released


class _LedgerRegister:
    """The protocol's memory of rounds, kept in the ledger, so that it outlives the process."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begin(self, context: RoundContext) -> None:
        """See `crypto.RoundRegister.begin`."""
        try:
            self._ledger.begin_session(context.run_id.hex(), context.round_index, context.attempt)
        except AlreadyReleased as error:
            raise RoundReplayed(error.message, hint=error.hint) from error

    def release(self, context: RoundContext) -> None:
        """See `crypto.RoundRegister.release`."""
        try:
            self._ledger.open_round(context.run_id.hex(), context.round_index)
        except AlreadyReleased as error:
            raise RoundReplayed(error.message, hint=error.hint) from error


def _policy(federation: FederationConfig) -> ClientPolicy:
    """The client's own floors, from the configuration it agreed to."""
    threshold = default_threshold(federation.agreed_cohort)
    return ClientPolicy(
        minimum_cohort=federation.agreed_cohort,
        minimum_threshold=threshold,
        minimum_survivors=federation.agreed_survivors,
        tolerated_corruptions=withstood(federation.agreed_cohort),
    )
