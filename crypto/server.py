"""The server's side of one round: a sans-IO, single-use state machine that learns a sum and nothing else.

The server never holds a vector of one client but while it adds it: `receive_masked` folds a masked vector
into the running sum at once. The masks come off that sum, in one step, after enough survivors have agreed on
whose vectors are in it. There is no attribute and no method from which one client's vector could be had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from functools import wraps
from threading import RLock
from typing import Any, TypeVar, cast

import numpy as np

from fedpt_secure.crypto import messages
from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.directory import Directory, check_advertisement
from fedpt_secure.crypto.errors import (
    BelowThreshold,
    DuplicateMessage,
    MalformedMessage,
    ProtocolStateError,
    TranscriptMismatch,
    UnknownSender,
)
from fedpt_secure.crypto.identities import Roster
from fedpt_secure.crypto.key_agreement import public_key, self_mask_commitment
from fedpt_secure.crypto.masks import pair_mask, self_mask
from fedpt_secure.crypto.packing import add_packed, packed_size, reduce_in_place, ring_dtype
from fedpt_secure.crypto.prg import RingVector, SignedKey, apply_masks
from fedpt_secure.crypto.recovery import ShareCollection
from fedpt_secure.crypto.sealing import SEALED_BYTES
from fedpt_secure.crypto.shamir import SHARE_BYTES
from fedpt_secure.crypto.wiping import wipe

_Method = TypeVar("_Method", bound=Callable[..., Any])


class ServerState(Enum):
    """What a server collects."""

    ADVERTISING = "collecting advertisements"
    SHARING = "collecting sealed shares"
    MASKING = "collecting masked vectors"
    CONFIRMING = "collecting confirmations"
    UNMASKING = "collecting unmasking shares"
    FINISHED = "finished: the round is over"
    ABORTED = "aborted: the round is over"


def _one_at_a_time(method: _Method) -> _Method:
    """A method that no other one overlaps: of two threads that add at once, one's vector could be lost, or twice in."""

    @wraps(method)
    def alone(server: SecAggServer, *arguments: Any, **settings: Any) -> Any:
        with server._turn:
            return method(server, *arguments, **settings)

    return cast(_Method, alone)


class SecAggServer:
    """The server in one round.

    `receive_*` takes one client's message, in any order of clients. A `MessageError` means that the message
    was ignored: the client counts as silent unless a good message follows. `publish_*`, `route_shares` and
    `aggregate` close a phase with whoever has been heard by then; if those are too few, they raise
    `BelowThreshold` and the machine is over. Calls from several threads wait for one another.

    Args:
        context: the round.
        roster: identities of the cohort.
        workers: threads that expand masks.

    Raises:
        ParameterError: the roster is not the one that the context names.
    """

    def __init__(self, *, context: RoundContext, roster: Roster, workers: int = 1) -> None:
        context.check_roster(roster)
        self._context = context
        self._roster = roster
        self._workers = workers
        self._turn = RLock()
        self._state = ServerState.ADVERTISING
        self._advertisements: dict[int, messages.Advertisement] = {}
        self._public_keys: set[bytes] = set()
        self._directory: Directory | None = None
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._sharers: tuple[int, ...] = ()
        self._total: RingVector | None = None
        self._summed: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._confirmations: dict[int, bytes] = {}
        self._unmasked: set[int] = set()
        self._shares = ShareCollection(context)

    @property
    def state(self) -> ServerState:
        """Where the server stands."""
        return self._state

    @property
    def members(self) -> tuple[str, ...]:
        """Clients in the key directory; empty before it is published."""
        return self._names(self._directory.members if self._directory else ())

    @property
    def sharers(self) -> tuple[str, ...]:
        """Clients that shared their keys; empty before the shares are routed."""
        return self._names(self._sharers)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Clients whose vectors are in the sum; empty before the list is published."""
        return self._names(self._survivors)

    @property
    def disputed_holders(self) -> tuple[str, ...]:
        """Clients whose share of some owner did not fit while others' made up for it; known once the sum is.

        Either such a client lied to the server, or the owner had dealt it a false share.
        """
        return self._names(self._shares.disputed_holders)

    @_one_at_a_time
    def receive_advertisement(self, client_id: str, message: bytes) -> None:
        """Phase 1: take one client's public keys.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        sender = self._expect(
            ServerState.ADVERTISING, client_id, range(len(self._context.cohort)), self._advertisements
        )
        advertisement = messages.decode(message, messages.Advertisement, self._context)
        self._check_sender(advertisement.sender, sender)
        check_advertisement(advertisement, self._context, self._roster, known_keys=self._public_keys)
        self._public_keys.update((advertisement.channel_key, advertisement.mask_key))
        self._advertisements[sender] = advertisement

    @_one_at_a_time
    def publish_keys(self) -> bytes:
        """Close phase 1: the key directory, the same bytes for every member.

        Raises:
            BelowThreshold: too few clients advertised.
        """
        self._require_state(ServerState.ADVERTISING)
        directory = Directory(self._advertisements, self._context)
        self._require_enough(self._advertisements, directory, "advertised keys")
        self._directory = directory
        self._state = ServerState.SHARING
        return directory.to_bytes()

    @_one_at_a_time
    def receive_shares(self, client_id: str, message: bytes) -> None:
        """Phase 2: take the shares that one client sealed for its neighbours.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        directory = self._checked_directory(ServerState.SHARING)
        sender = self._expect(ServerState.SHARING, client_id, directory.members, self._sealed)
        neighbours = directory.graph.neighbours(sender)
        shares = messages.decode(
            message, messages.SealedShares, self._context, body_bytes=len(neighbours) * SEALED_BYTES
        )
        self._check_sender(shares.sender, sender)
        pairs = messages.split_records(
            shares.sealed, count=len(neighbours), size=SEALED_BYTES, what="sealed pairs of shares"
        )
        signed = messages.shares_to_sign(self._context, directory=directory.digest, sender=sender, sealed=shares.sealed)
        self._roster.verify(client_id, signed, shares.signature)
        self._sealed[sender] = dict(zip(neighbours, pairs, strict=True))

    @_one_at_a_time
    def route_shares(self) -> dict[str, bytes]:
        """Close phase 2: one inbox for each client that shared its keys, by client id.

        Raises:
            BelowThreshold: too few clients shared their keys.
        """
        directory = self._checked_directory(ServerState.SHARING)
        self._require_enough(self._sealed, directory, "shared keys")
        self._sharers = tuple(sorted(self._sealed))
        sharers = messages.encode_set(self._sharers, self._context)
        inboxes = {}
        for receiver in self._sharers:
            senders = [peer for peer in directory.graph.neighbours(receiver) if peer in self._sealed]
            inbox = messages.ShareInbox(
                session=self._context.session_digest,
                sharers=sharers,
                sealed=b"".join(self._sealed[peer][receiver] for peer in senders),
            )
            inboxes[self._context.cohort[receiver]] = messages.encode(inbox)
        self._sealed.clear()
        self._total = np.zeros(self._context.vector_length, dtype=ring_dtype(self._context.ring_bits))
        self._state = ServerState.MASKING
        return inboxes

    @_one_at_a_time
    def receive_masked(self, client_id: str, message: bytes) -> None:
        """Phase 3: add one client's masked vector to the running sum.

        Raises:
            MessageError: the message was ignored, the sum is unchanged; the subclass says why.
        """
        directory = self._checked_directory(ServerState.MASKING)
        total = self._running_total()
        sender = self._expect(ServerState.MASKING, client_id, self._sharers, self._summed)
        size = packed_size(self._context.vector_length, self._context.ring_bits)
        masked = messages.decode(message, messages.MaskedVector, self._context, body_bytes=size)
        self._check_sender(masked.sender, sender)
        signed = messages.masked_to_sign(
            self._context,
            directory=directory.digest,
            sender=sender,
            sharers=masked.sharers,
            vector=masked.vector,
        )
        self._roster.verify(client_id, signed, masked.signature)
        if masked.sharers != messages.encode_set(self._sharers, self._context):
            raise TranscriptMismatch(f"client {client_id!r} masked against other sharers than the server routed")
        try:
            add_packed(total, masked.vector, self._context.ring_bits)
        except MalformedMessage:
            raise
        except BaseException:
            # A vector that was added in part, as when memory runs out, must not stay in the sum.
            self._abort()
            raise
        self._summed.add(sender)

    @_one_at_a_time
    def publish_survivors(self) -> bytes:
        """Close phase 3: the survivor list, the same bytes for every survivor. Later vectors are refused.

        Raises:
            BelowThreshold: too few masked vectors arrived.
        """
        directory = self._checked_directory(ServerState.MASKING)
        self._require_enough(self._summed, directory, "sent masked vectors")
        self._survivors = tuple(sorted(self._summed))
        self._state = ServerState.CONFIRMING
        return messages.encode(
            messages.Survivors(
                session=self._context.session_digest,
                survivors=messages.encode_set(self._survivors, self._context),
            )
        )

    @_one_at_a_time
    def receive_confirmation(self, client_id: str, message: bytes) -> None:
        """Phase 4: take one survivor's signature on the survivor list.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        directory = self._checked_directory(ServerState.CONFIRMING)
        sender = self._expect(ServerState.CONFIRMING, client_id, self._survivors, self._confirmations)
        confirmation = messages.decode(message, messages.Confirmation, self._context)
        self._check_sender(confirmation.sender, sender)
        signed = messages.survivors_to_sign(
            self._context,
            directory=directory.digest,
            sharers=messages.encode_set(self._sharers, self._context),
            survivors=messages.encode_set(self._survivors, self._context),
        )
        self._roster.verify(client_id, signed, confirmation.signature)
        self._confirmations[sender] = confirmation.signature

    @_one_at_a_time
    def publish_confirmations(self) -> bytes:
        """Close phase 4: all signatures on the survivor list, the same bytes for everyone that confirmed.

        Raises:
            BelowThreshold: too few survivors confirmed.
        """
        directory = self._checked_directory(ServerState.CONFIRMING)
        self._require_number(self._confirmations, self._context.quorum, "confirmed the survivor list")
        self._require_holders(self._confirmations, directory, "confirmed the survivor list")
        confirmed = sorted(self._confirmations)
        self._state = ServerState.UNMASKING
        return messages.encode(
            messages.Confirmations(
                session=self._context.session_digest,
                confirmed=messages.encode_set(confirmed, self._context),
                signatures=b"".join(self._confirmations[member] for member in confirmed),
            )
        )

    @_one_at_a_time
    def receive_unmasking(self, client_id: str, message: bytes) -> None:
        """Phase 5: take one client's shares, exactly one of each peer.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        directory = self._checked_directory(ServerState.UNMASKING)
        sender = self._expect(ServerState.UNMASKING, client_id, self._confirmations, self._unmasked)
        present = set(self._sharers)
        owners = [owner for owner in directory.graph.holders(sender) if owner in present]
        unmasking = messages.decode(message, messages.Unmasking, self._context, body_bytes=len(owners) * SHARE_BYTES)
        self._check_sender(unmasking.sender, sender)
        records = messages.split_records(unmasking.shares, count=len(owners), size=SHARE_BYTES, what="shares")
        signed = messages.unmasking_to_sign(
            self._context,
            directory=directory.digest,
            sender=sender,
            sharers=messages.encode_set(self._sharers, self._context),
            survivors=messages.encode_set(self._survivors, self._context),
            shares=unmasking.shares,
        )
        self._roster.verify(client_id, signed, unmasking.signature)
        self._shares.add(dict(zip(owners, records, strict=True)), holder=sender)
        self._unmasked.add(sender)

    @_one_at_a_time
    def aggregate(self) -> RingVector:
        """Close phase 5 and the round: the sum of the survivors' vectors in Z_{2^ring_bits}, exactly.

        Returns:
            [vector_length], dtype of the ring.

        Raises:
            BelowThreshold: too few clients sent their shares.
            ReconstructionFailed: shares do not give what their owner committed to.
        """
        directory = self._checked_directory(ServerState.UNMASKING)
        self._require_holders(self._unmasked, directory, "sent unmasking shares")
        total = self._running_total()
        # Aborted until the sum is exact: nobody gets a half-unmasked one.
        self._abort()
        try:
            apply_masks(total, self._masks_in_sum(directory), workers=self._workers)
        finally:
            self._shares.clear()
        reduce_in_place(total, self._context.ring_bits)
        self._state = ServerState.FINISHED
        return total

    def _masks_in_sum(self, directory: Directory) -> list[SignedKey]:
        """The masks left in the sum, with the signs that take them off.

        They are every survivor's self mask, and the pairwise masks between a survivor and a neighbour that
        dropped out after sharing its keys.
        """
        survivors = set(self._survivors)
        masks: list[SignedKey] = []
        for owner in self._sharers:
            if owner in survivors:
                masks.append((-1, self._self_mask(owner, directory)))
            else:
                masks.extend(self._orphaned_masks(owner, directory, survivors))
        return masks

    def _self_mask(self, owner: int, directory: Directory) -> bytes:
        session, name = self._context.session_digest, self._context.cohort[owner]
        committed = directory.advertisements[owner].seed_commitment
        seed = self._shares.rebuild(
            owner, lambda seed: self_mask_commitment(seed, session_digest=session, owner=name) == committed
        )
        key = self_mask(seed, owner=owner, directory=directory, context=self._context)
        wipe(seed)
        return key

    def _orphaned_masks(self, dropped: int, directory: Directory, survivors: set[int]) -> list[SignedKey]:
        advertised = directory.advertisements[dropped].mask_key
        private = self._shares.rebuild(dropped, lambda private: public_key(private) == advertised)
        # The dropout's own masks are the opposites of those that its neighbours applied: adding them takes those off.
        masks = [
            pair_mask(private, owner=dropped, peer=peer, directory=directory, context=self._context)
            for peer in directory.graph.neighbours(dropped)
            if peer in survivors
        ]
        wipe(private)
        return masks

    def _expect(self, state: ServerState, client_id: str, allowed: Collection[int], heard: Collection[int]) -> int:
        self._require_state(state)
        sender = self._context.index_of(client_id)
        if sender not in allowed:
            raise UnknownSender(f"client {client_id!r} took no part in the phase before")
        if sender in heard:
            raise DuplicateMessage(f"client {client_id!r} was heard in this phase already; the first message stands")
        return sender

    def _check_sender(self, claimed: int, sender: int) -> None:
        if claimed != sender:
            raise UnknownSender(
                f"a message handed in for client {self._context.cohort[sender]!r} "
                f"names {self._context.cohort[claimed]!r} as its sender"
            )

    def _require_state(self, expected: ServerState) -> None:
        if self._state is not expected:
            raise ProtocolStateError(
                f"the server is {self._state.value!r}; this call needs {expected.value!r}",
                hint="a server serves one round, one phase after the other; start another attempt with a new server",
            )

    def _checked_directory(self, state: ServerState) -> Directory:
        self._require_state(state)
        if self._directory is None:
            raise ProtocolStateError("the key directory was not published yet")
        return self._directory

    def _running_total(self) -> RingVector:
        if self._total is None:
            raise ProtocolStateError("there is no sum")
        return self._total

    def _require_enough(self, present: Collection[int], directory: Directory, what: str) -> None:
        self._require_number(present, self._context.minimum_survivors, what)
        self._require_holders(present, directory, what)

    def _require_number(self, present: Collection[int], minimum: int, what: str) -> None:
        heard = len(present)  # before `_abort` forgets who that was
        if heard < minimum:
            self._abort()
            raise BelowThreshold(f"{heard} of {len(self._context.cohort)} clients {what}; the round needs {minimum}")

    def _require_holders(self, present: Collection[int], directory: Directory, what: str) -> None:
        threshold = self._context.threshold
        holders = directory.graph.fewest_holders(self._sharers or present, present)
        if holders < threshold:
            self._abort()
            raise BelowThreshold(
                f"of the holders of a client's shares only {holders} {what}; the threshold is {threshold}",
                hint="start another attempt; if clients drop out this often, a larger cohort leaves more room",
            )

    def _abort(self) -> None:
        """Leave the protocol: the sum and the sealed shares are gone."""
        self._state = ServerState.ABORTED
        self._total = None
        self._sealed.clear()

    def _names(self, indices: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._context.cohort[index] for index in indices)
