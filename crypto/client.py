"""The client's side of one round: a sans-IO, single-use state machine.

It follows Bonawitz et al. 2017, Fig. 4, in the variant against an actively malicious server. The server is
the adversary: nothing it says is used before it is checked, and the first thing that does not check ends the
round for this client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fedpt_secure.crypto import messages
from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.errors import (
    BelowThreshold,
    OwnKeysMissing,
    ParameterError,
    ProtocolStateError,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
)
from fedpt_secure.crypto.identities import SIGNATURE_BYTES, Identity, Roster
from fedpt_secure.crypto.key_agreement import KeyPair, seal_key, self_mask_commitment, shared_secret
from fedpt_secure.crypto.masks import pair_mask, self_mask
from fedpt_secure.crypto.neighbours import share_point
from fedpt_secure.crypto.packing import check_vector, pack, reduce_in_place
from fedpt_secure.crypto.policy import ClientPolicy, RoundRegister
from fedpt_secure.crypto.prg import RingVector, SignedKey, apply_masks
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes
from fedpt_secure.crypto.sealing import SEALED_BYTES, associated_data, seal, unseal
from fedpt_secure.crypto.shamir import split
from fedpt_secure.crypto.single_use import ClientState, SingleUseClient
from fedpt_secure.crypto.wiping import wipe_all


class SecAggClient(SingleUseClient):
    """One client in one round.

    Guarantees (for an honest client, against a server that controls fewer than 2 threshold - holders of each
    client's share holders, under the assumptions of `docs/protocol.md`): the vector leaves only as a masked
    one, and what the server learns is at most one sum, over a survivor list of at least `minimum_survivors`
    clients that holds this client and that a quorum signed.

    Every error but `ProtocolStateError` and the `ParameterError` of a bad vector wipes the secrets and ends
    the machine. It cannot be copied or pickled, and serves one thread at a time: either would be a second try.

    Args:
        context: the round, as this client sees it; in particular the digest of the weights that it was given.
        identity: the client's long-term key.
        client_id: its name in the roster.
        roster: the identities it trusts.
        policy: its own floors.
        register: its memory of rounds; None if the caller keeps rounds from being replayed in another way.
        random_bytes: source of keys, seeds and share coefficients.
        workers: threads that expand masks.

    Raises:
        ParameterError: roster, identity, client id and context do not belong together.
        PolicyViolation: the policy forbids the round; nothing was sent.
    """

    def __init__(
        self,
        *,
        context: RoundContext,
        identity: Identity,
        client_id: str,
        roster: Roster,
        policy: ClientPolicy,
        register: RoundRegister | None = None,
        random_bytes: RandomBytes = SYSTEM_RANDOM,
        workers: int = 1,
    ) -> None:
        context.check_roster(roster)
        if client_id not in context.cohort:
            raise ParameterError(f"client {client_id!r} is not in the cohort of this round")
        if roster[client_id] != identity.verify_key_bytes:
            raise ParameterError(f"the roster names another key for client {client_id!r} than its identity's")
        policy.check(context)
        if register is not None:
            register.begin(context)
        self._context = context
        self._identity = identity
        self._roster = roster
        self._register = register
        self._random_bytes = random_bytes
        self._workers = workers
        SingleUseClient.__init__(self)
        self._index = context.index_of(client_id)
        self._channel = KeyPair.generate(random_bytes)
        self._mask = KeyPair.generate(random_bytes)
        self._seed = bytearray(random_bytes(32))
        self._own_entry = b""
        self._directory: Directory | None = None
        self._channel_secrets: dict[int, bytearray] = {}
        self._held_shares: dict[int, tuple[bytearray, bytearray]] = {}
        self._sharers: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._opened: tuple[bytes, tuple[int, ...]] | None = None

    def advertise(self) -> bytes:
        """Phase 1: fresh keys and a commitment to the self-mask seed, signed."""
        with self._step(ClientState.READY, ClientState.ADVERTISED):
            commitment = self_mask_commitment(
                self._seed, session_digest=self._context.session_digest, owner=self._name(self._index)
            )
            to_sign = messages.advertisement_to_sign(
                self._context,
                sender=self._index,
                channel_key=self._channel.public,
                mask_key=self._mask.public,
                seed_commitment=commitment,
            )
            advertisement = messages.Advertisement(
                session=self._context.session_digest,
                sender=self._index,
                channel_key=self._channel.public,
                mask_key=self._mask.public,
                seed_commitment=commitment,
                signature=self._identity.sign(to_sign),
            )
            self._own_entry = messages.directory_entry(advertisement)
            return messages.encode(advertisement)

    def share_keys(self, key_directory: bytes) -> bytes:
        """Phase 2: check everybody's keys; split the private mask key and the seed among the neighbours, sealed.

        Raises:
            MessageError: the directory, or an advertisement in it, is not acceptable.
            OwnKeysMissing: the client's own advertisement is not in it as it was sent.
            BelowThreshold: too few clients advertised.
        """
        with self._step(ClientState.ADVERTISED, ClientState.SHARED):
            directory = Directory.from_bytes(key_directory, self._context, self._roster)
            own = directory.advertisements.get(self._index)
            if own is None or messages.directory_entry(own) != self._own_entry:
                raise OwnKeysMissing("the key directory does not hold this client's advertisement as it was sent")
            self._require_enough(directory.members, directory, "advertised keys")
            self._directory = directory
            sealed = b"".join(self._seal_shares(directory))
            to_sign = messages.shares_to_sign(
                self._context, directory=directory.digest, sender=self._index, sealed=sealed
            )
            return messages.encode(
                messages.SealedShares(
                    session=self._context.session_digest,
                    sender=self._index,
                    sealed=sealed,
                    signature=self._identity.sign(to_sign),
                )
            )

    def open_inbox(self, inbox: bytes) -> None:
        """Phase 3, its first half, optional: open the shares of others, before a vector is computed.

        What others may have done wrong comes out here, so that nobody trains, and spends privacy, for a round that
        cannot be masked. `mask` then takes the same inbox and no other.

        Raises:
            MessageError: the inbox is not acceptable.
            ShareRejected: a sealed share does not open.
            BelowThreshold: too few clients shared their keys.
        """
        with self._step(ClientState.SHARED, ClientState.SHARED):
            if self._opened is not None:
                raise ProtocolStateError("the inbox was opened before")
            self._opened = (hashlib.sha256(inbox).digest(), self._open_inbox(inbox, self._checked_directory()))

    def mask(self, inbox: bytes, vector: RingVector) -> bytes:
        """Phase 3: open the shares of others, add the masks, send the masked vector.

        Args:
            inbox: the server's message for this client.
            vector: [vector_length], dtype of the ring, every element below 2^ring_bits; it is not changed.

        Raises:
            ParameterError: the vector is not of that form; the machine goes on.
            MessageError: the inbox is not acceptable, or another than `open_inbox` had.
            ShareRejected: a sealed share does not open.
            BelowThreshold: too few clients shared their keys.
        """
        self._require_state(ClientState.SHARED)
        check_vector(vector, length=self._context.vector_length, ring_bits=self._context.ring_bits)
        with self._step(ClientState.SHARED, ClientState.MASKED):
            directory = self._checked_directory()
            opened = self._opened or (hashlib.sha256(inbox).digest(), self._open_inbox(inbox, directory))
            if opened[0] != hashlib.sha256(inbox).digest():
                raise TranscriptMismatch("the vector is to go with another inbox than the one that was opened")
            peers = opened[1]
            masked = vector.copy()
            apply_masks(masked, self._masks(peers, directory), workers=self._workers)
            reduce_in_place(masked, self._context.ring_bits)
            packed = memoryview(pack(masked, self._context.ring_bits))
            self._erase_own_secrets()
            sharers = messages.encode_set(self._sharers, self._context)
            to_sign = messages.masked_to_sign(
                self._context, directory=directory.digest, sender=self._index, sharers=sharers, vector=packed
            )
            return messages.encode(
                messages.MaskedVector(
                    session=self._context.session_digest,
                    sender=self._index,
                    sharers=sharers,
                    vector=packed,
                    signature=self._identity.sign(to_sign),
                )
            )

    def confirm(self, survivor_list: bytes) -> bytes:
        """Phase 4: check the survivor list and sign it. From here on no other list can be opened with this client.

        Raises:
            MessageError: the list is not acceptable.
            SurvivorsRejected: it lacks this client, or names one that shared no keys.
            BelowThreshold: it is too short.
            RoundReplayed: in the k-regular graph, the register says that another attempt of the round was confirmed.
        """
        with self._step(ClientState.MASKED, ClientState.CONFIRMED):
            directory = self._checked_directory()
            message = messages.decode(survivor_list, messages.Survivors, self._context)
            survivors = messages.decode_set(message.survivors, self._context)
            if self._index not in survivors:
                raise SurvivorsRejected(
                    "the survivor list lacks this client, which sent its masked vector",
                    hint="if the vector came too late, the server must not ask this client any more",
                )
            if not set(survivors) <= set(self._sharers):
                raise SurvivorsRejected("the survivor list names a client that shared no keys")
            self._require_enough(survivors, directory, "survive")
            if self._register is not None and self._context.degree is not None:
                # Share holders differ from attempt to attempt: clients that release in one attempt each could open two.
                # Signatures cannot reach a quorum in both.
                self._register.release(self._context)
            self._survivors = survivors
            return messages.encode(
                messages.Confirmation(
                    session=self._context.session_digest,
                    sender=self._index,
                    signature=self._identity.sign(self._survivor_statement(directory)),
                )
            )

    def unmask(self, confirmations: bytes) -> bytes:
        """Phase 5: check that enough clients signed the same list; release one share of each peer.

        Of a survivor the share of the self-mask seed, of a client that dropped out the share of the mask key,
        never both: a server that had both could take off all masks of that client.

        Raises:
            MessageError: the confirmations are not acceptable.
            TranscriptMismatch: a confirmation does not sign the list, keys and sharers that this client was shown.
            BelowThreshold: too few clients confirmed.
            RoundReplayed: in the complete graph, the register says that another attempt of the round was opened.
        """
        with self._step(ClientState.CONFIRMED, ClientState.FINISHED):
            directory = self._checked_directory()
            self._check_confirmations(confirmations, directory)
            survivors = set(self._survivors)
            shares = bytearray()
            for peer in sorted(self._held_shares):
                mask_key_share, seed_share = self._held_shares[peer]
                shares += seed_share if peer in survivors else mask_key_share
            to_sign = messages.unmasking_to_sign(
                self._context,
                directory=directory.digest,
                sender=self._index,
                sharers=messages.encode_set(self._sharers, self._context),
                survivors=messages.encode_set(self._survivors, self._context),
                shares=bytes(shares),
            )
            if self._register is not None and self._context.degree is None:
                self._register.release(self._context)
            self._erase_held_shares()
            return messages.encode(
                messages.Unmasking(
                    session=self._context.session_digest,
                    sender=self._index,
                    shares=bytes(shares),
                    signature=self._identity.sign(to_sign),
                )
            )

    def _erase(self) -> None:
        self._erase_own_secrets()
        self._erase_held_shares()

    def _checked_directory(self) -> Directory:
        if self._directory is None:
            raise ProtocolStateError("no key directory was accepted yet")
        return self._directory

    def _name(self, index: int) -> str:
        return self._context.cohort[index]

    def _require_enough(self, present: tuple[int, ...], directory: Directory, what: str) -> None:
        minimum, threshold = self._context.minimum_survivors, self._context.threshold
        if len(present) < minimum:
            raise BelowThreshold(f"{len(present)} clients {what}; the round needs {minimum}")
        holders = directory.graph.fewest_holders([self._index], present)
        if holders < threshold:
            raise BelowThreshold(f"{holders} of this client's share holders {what}; the threshold is {threshold}")

    def _seal_shares(self, directory: Directory) -> Iterator[bytes]:
        holders = directory.graph.holders(self._index)
        points = [share_point(holder) for holder in holders]
        threshold, draw = self._context.threshold, self._random_bytes
        mask_shares = split(self._mask.private, points=points, threshold=threshold, random_bytes=draw)
        seed_shares = split(self._seed, points=points, threshold=threshold, random_bytes=draw)
        pairs = dict(zip(holders, zip(mask_shares, seed_shares, strict=True), strict=True))
        self._held_shares[self._index] = pairs.pop(self._index)
        try:
            for holder, (mask_share, seed_share) in pairs.items():
                secret = shared_secret(self._channel.private, directory.advertisements[holder].channel_key)
                self._channel_secrets[holder] = secret
                key, data = self._sealing(secret, directory, sender=self._index, receiver=holder)
                yield seal(key, mask_share, seed_share, data=data)
        finally:
            for shares in pairs.values():
                wipe_all(shares)

    def _sealing(self, secret: bytearray, directory: Directory, *, sender: int, receiver: int) -> tuple[bytes, bytes]:
        """Key and associated data of what `sender` seals for `receiver`."""
        session, digest = self._context.session_digest, directory.digest
        names = {"sender": self._name(sender), "receiver": self._name(receiver)}
        key = seal_key(secret, session_digest=session, directory_digest=digest, **names)
        point = share_point(receiver)
        return key, associated_data(session_digest=session, directory_digest=digest, point=point, **names)

    def _open_inbox(self, inbox: bytes, directory: Directory) -> tuple[int, ...]:
        neighbours = directory.graph.neighbours(self._index)
        message = messages.decode(inbox, messages.ShareInbox, self._context, body_bytes=len(neighbours) * SEALED_BYTES)
        sharers = messages.decode_set(message.sharers, self._context)
        if self._index not in sharers or not set(sharers) <= set(directory.members):
            raise TranscriptMismatch("the list of those who shared keys lacks this client or names an outsider")
        self._require_enough(sharers, directory, "shared keys")
        present = set(sharers)
        peers = tuple(peer for peer in neighbours if peer in present)
        pairs = messages.split_records(
            message.sealed, count=len(peers), size=SEALED_BYTES, what="sealed pairs of shares"
        )
        for peer, sealed in zip(peers, pairs, strict=True):
            secret = self._channel_secrets[peer]
            key, data = self._sealing(secret, directory, sender=peer, receiver=self._index)
            self._held_shares[peer] = unseal(key, sealed, data=data, sender=self._name(peer))
        self._sharers = sharers
        return peers

    def _masks(self, peers: tuple[int, ...], directory: Directory) -> list[SignedKey]:
        own, context = self._index, self._context
        masks: list[SignedKey] = [(1, self_mask(self._seed, owner=own, directory=directory, context=context))]
        masks += [
            pair_mask(self._mask.private, owner=own, peer=peer, directory=directory, context=context) for peer in peers
        ]
        return masks

    def _survivor_statement(self, directory: Directory) -> bytes:
        return messages.survivors_to_sign(
            self._context,
            directory=directory.digest,
            sharers=messages.encode_set(self._sharers, self._context),
            survivors=messages.encode_set(self._survivors, self._context),
        )

    def _check_confirmations(self, confirmations: bytes, directory: Directory) -> None:
        message = messages.decode(
            confirmations,
            messages.Confirmations,
            self._context,
            body_bytes=len(self._survivors) * SIGNATURE_BYTES,
        )
        confirmed = messages.decode_set(message.confirmed, self._context)
        if not set(confirmed) <= set(self._survivors):
            raise TranscriptMismatch("a client confirmed that is not in the survivor list this client was shown")
        signatures = messages.split_records(
            message.signatures, count=len(confirmed), size=SIGNATURE_BYTES, what="signatures"
        )
        statement = self._survivor_statement(directory)
        for member, signature in zip(confirmed, signatures, strict=True):
            try:
                self._roster.verify(self._name(member), statement, signature)
            except SignatureInvalid:
                raise TranscriptMismatch(
                    f"client {self._name(member)!r} did not sign the survivor list that this client was shown",
                    hint="the server showed two lists, or a message was altered; nothing was released",
                ) from None
        quorum, threshold = self._context.quorum, self._context.threshold
        if len(confirmed) < quorum:
            raise BelowThreshold(f"{len(confirmed)} clients confirmed the survivor list; {quorum} are needed")
        holders = directory.graph.fewest_holders([self._index], confirmed)
        if holders < threshold:
            raise BelowThreshold(f"{holders} share holders confirmed the survivor list; the threshold is {threshold}")

    def _erase_own_secrets(self) -> None:
        wipe_all((self._channel.private, self._mask.private, self._seed, *self._channel_secrets.values()))
        self._channel_secrets.clear()

    def _erase_held_shares(self) -> None:
        for shares in self._held_shares.values():
            wipe_all(shares)
        self._held_shares.clear()
