"""The client's side of one round under CKKS: a sans-IO, single-use state machine.

It has the phases and methods of `SecAggClient`, so that an engine can carry either. `docs/ckks.md` has the protocol and
says what it does not promise: the server follows the protocol, and no client is in league with it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto import ckks_messages as messages
from fedpt_secure.crypto.ckks import CkksKey, check_values, flooded
from fedpt_secure.crypto.ckks_keys import (
    ENVELOPE_OVERHEAD_BYTES,
    GROUP_KEY_BYTES,
    CkksDirectory,
    GroupKey,
    seal_group_key,
    sealed_keys_digest,
    unseal_group_key,
)
from fedpt_secure.crypto.ckks_messages import CkksSession
from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import (
    BelowThreshold,
    DealerMissing,
    KeyRejected,
    OwnKeysMissing,
    ParameterError,
    ProtocolStateError,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
)
from fedpt_secure.crypto.identities import SIGNATURE_BYTES, Identity, Roster
from fedpt_secure.crypto.key_agreement import KeyPair, shared_secret
from fedpt_secure.crypto.labels import DIGEST_BYTES
from fedpt_secure.crypto.messages import decode_set, encode_set, split_records
from fedpt_secure.crypto.policy import ClientPolicy, RoundRegister
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, RandomBytes
from fedpt_secure.crypto.single_use import ClientState, SingleUseClient
from fedpt_secure.crypto.wiping import wipe


class CkksClient(SingleUseClient):
    """One client in one round.

    **Guarantees** Against a server that follows the protocol and keeps all it sees, and whoever listens on the network:
    nothing is learned of the vector but through the sum over the survivors, with 128-bit security, up to a statistical
    distance of 2^-flooding_bits a round. The client decrypts one sum at most, over survivors and ciphertexts that a
    quorum signed alike and among which it found its own.

    **Assumptions** No client is in league with the server, since every client can decrypt every vector; what the server
    calls the sum is the sum, and nobody else speaks in its name (TLS).

    Every error but `ProtocolStateError` and the `EncodingError` of a bad vector ends the machine. It cannot be copied
    or pickled, and serves one thread at a time.

    Args:
        context: the round, as this client sees it; its `threshold` is the quorum.
        parameters: fitted to the round by the client itself.
        identity: the client's long-term key.
        client_id: its name in the roster.
        roster: the identities it trusts.
        policy: its own floors.
        register: its memory of rounds; None if the caller keeps rounds from being replayed in another way.
        random_bytes: source of channel and group keys. SEAL draws the CKKS key and encryption errors by itself.

    Raises:
        ParameterError: roster, identity, client id, context and parameters do not belong together.
        PolicyViolation: the policy forbids the round; nothing was sent.
    """

    def __init__(
        self,
        *,
        context: RoundContext,
        parameters: CkksParameters,
        identity: Identity,
        client_id: str,
        roster: Roster,
        policy: ClientPolicy,
        register: RoundRegister | None = None,
        random_bytes: RandomBytes = SYSTEM_RANDOM,
    ) -> None:
        context.check_roster(roster)
        if client_id not in context.cohort:
            raise ParameterError(f"client {client_id!r} is not in the cohort of this round")
        if roster[client_id] != identity.verify_key_bytes:
            raise ParameterError(f"the roster names another key for client {client_id!r} than its identity's")
        self._session = CkksSession(context, parameters)
        policy.check(context)
        if register is not None:
            register.begin(context)
        self._identity = identity
        self._roster = roster
        self._register = register
        self._random_bytes = random_bytes
        self._index = context.index_of(client_id)
        SingleUseClient.__init__(self)
        self._channel = KeyPair.generate(random_bytes)
        self._signature = b""
        self._directory: CkksDirectory | None = None
        self._group_key: GroupKey | None = None
        self._ckks_key: CkksKey | None = None
        self._deal = b""
        self._ciphertexts = b""
        self._sharers: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._statement = b""
        self._total = b""
        self._opened: tuple[bytes, CkksKey] | None = None

    def advertise(self) -> bytes:
        """Phase 1: a fresh channel key, signed."""
        with self._step(ClientState.READY, ClientState.ADVERTISED):
            to_sign = messages.advertisement_to_sign(
                self._session, sender=self._index, channel_key=self._channel.public
            )
            self._signature = self._identity.sign(to_sign)
            return messages.encode(
                messages.CkksAdvertisement(
                    session=self._session.digest,
                    sender=self._index,
                    channel_key=self._channel.public,
                    signature=self._signature,
                )
            )

    def share_keys(self, key_directory: bytes) -> bytes:
        """Phase 2: check everybody's keys; the dealer makes and seals the round's CKKS key, the others say so much.

        Raises:
            MessageError: the directory, or an advertisement in it, is not acceptable.
            OwnKeysMissing: the client's own advertisement is not in it as it was sent.
            BelowThreshold: too few clients advertised.
        """
        with self._step(ClientState.ADVERTISED, ClientState.SHARED):
            directory = CkksDirectory.from_bytes(key_directory, self._session, self._roster)
            if directory.channel_keys.get(self._index) != self._channel.public:
                raise OwnKeysMissing("the key directory does not hold this client's advertisement as it was sent")
            self._require_enough(directory.members, "advertised keys")
            self._directory = directory
            if directory.dealer == self._index:
                return messages.encode(self._make_deal(directory))
            to_sign = messages.ready_to_sign(self._session, directory=directory.digest, sender=self._index)
            return messages.encode(
                messages.KeyReady(
                    session=self._session.digest, sender=self._index, signature=self._identity.sign(to_sign)
                )
            )

    def open_inbox(self, inbox: bytes) -> None:
        """Phase 3, its first half, optional: open the dealt key before a vector is computed.

        Raises:
            MessageError: the inbox is not acceptable.
            DealerMissing, KeyRejected, BelowThreshold: as `mask`.
        """
        with self._step(ClientState.SHARED, ClientState.SHARED):
            if self._opened is not None:
                raise ProtocolStateError("the inbox was opened before")
            self._opened = (hashlib.sha256(inbox).digest(), self._open_inbox(inbox))

    def mask(self, inbox: bytes, vector: npt.NDArray[np.float64]) -> bytes:
        """Phase 3: open the dealt key, encrypt the vector.

        Args:
            inbox: the server's message for this client.
            vector: [length], float64, every coordinate within the bound.

        Raises:
            EncodingError: the vector is not of that form; the machine goes on.
            MessageError: the inbox is not acceptable.
            DealerMissing: the dealer is not among those who go on.
            KeyRejected: the dealt key does not open, or is not the one that was committed to.
            BelowThreshold: too few clients go on.
        """
        self._require_state(ClientState.SHARED)
        check_values(vector, self._session.parameters)
        with self._step(ClientState.SHARED, ClientState.MASKED):
            opened = self._opened or (hashlib.sha256(inbox).digest(), self._open_inbox(inbox))
            if opened[0] != hashlib.sha256(inbox).digest():
                raise TranscriptMismatch("the vector is to go with another inbox than the one that was opened")
            key, self._opened = opened[1], None
            ciphertexts = messages.pack_ciphertexts(key.encrypt(vector))
            self._ckks_key = key
            self._ciphertexts = messages.ciphertexts_digest(ciphertexts)
            sharers = encode_set(self._sharers, self._session.context)
            to_sign = messages.vector_to_sign(
                self._session, deal=self._deal, sender=self._index, sharers=sharers, ciphertexts=self._ciphertexts
            )
            return messages.encode(
                messages.EncryptedVector(
                    session=self._session.digest,
                    sender=self._index,
                    sharers=sharers,
                    ciphertexts=ciphertexts,
                    signature=self._identity.sign(to_sign),
                )
            )

    def confirm(self, survivor_list: bytes) -> bytes:
        """Phase 4: check the survivors and sign them with the digest of their sum. No other sum is decrypted after it.

        Raises:
            MessageError: the list is not acceptable.
            SurvivorsRejected: it lacks this client, or names one that has no key.
            TranscriptMismatch: it names other ciphertexts for this client than it sent.
            BelowThreshold: it is too short.
        """
        with self._step(ClientState.MASKED, ClientState.CONFIRMED):
            context = self._session.context
            body = len(self._sharers) * DIGEST_BYTES
            message = messages.decode(survivor_list, messages.CkksSurvivors, self._session, body_bytes=body)
            survivors = decode_set(message.survivors, context)
            records = split_records(message.digests, count=len(survivors), size=DIGEST_BYTES, what="digests")
            digests = dict(zip(survivors, records, strict=True))
            if self._index not in digests:
                raise SurvivorsRejected(
                    "the survivor list lacks this client, which sent its encrypted vector",
                    hint="if the vector came too late, the server must not ask this client any more",
                )
            if not set(survivors) <= set(self._sharers):
                raise SurvivorsRejected("the survivor list names a client that has no key")
            if digests[self._index] != self._ciphertexts:
                raise TranscriptMismatch("the survivor list names other ciphertexts for this client than it sent")
            self._require_enough(survivors, "survive")
            self._survivors = survivors
            self._total = message.total
            self._statement = messages.survivors_to_sign(
                self._session,
                deal=self._deal,
                sharers=self._sharers,
                survivors=survivors,
                digests=message.digests,
                total=message.total,
            )
            return messages.encode(
                messages.CkksConfirmation(
                    session=self._session.digest,
                    sender=self._index,
                    signature=self._identity.sign(self._statement),
                )
            )

    def unmask(self, confirmations: bytes) -> bytes:
        """Phase 5: check that a quorum signed the same; decrypt the sum they signed, add the flooding noise, send it.

        Raises:
            MessageError: the confirmations, or the ciphertexts of the sum, are not acceptable.
            TranscriptMismatch: a confirmation signs something else, or the sum is not the one that was signed.
            BelowThreshold: too few clients confirmed.
            RoundReplayed: the register says that another attempt of the round was opened.
            EncodingError: the sum is beyond what clients that keep to the bound can reach.
        """
        with self._step(ClientState.CONFIRMED, ClientState.FINISHED):
            total = self._check_confirmations(confirmations)
            key, group_key = self._ckks_key, self._group_key
            if key is None or group_key is None:
                raise ProtocolStateError("there is no key")
            if self._register is not None:
                self._register.release(self._session.context)
            noise_key = group_key.flooding_key(self._statement)
            answer = flooded(key.decrypt(total), self._session.parameters, key=noise_key)
            self._erase()
            values = messages.answer_to_bytes(answer)
            to_sign = messages.decryption_to_sign(
                self._session, statement=self._statement, sender=self._index, values=values
            )
            return messages.encode(
                messages.Decryption(
                    session=self._session.digest,
                    sender=self._index,
                    values=values,
                    signature=self._identity.sign(to_sign),
                )
            )

    def _name(self, index: int) -> str:
        return self._session.context.cohort[index]

    def _require_enough(self, present: tuple[int, ...], what: str) -> None:
        needed = max(self._session.context.minimum_survivors, self._session.quorum)
        if len(present) < needed:
            raise BelowThreshold(f"{len(present)} clients {what}; the round needs {needed}")

    def _make_deal(self, directory: CkksDirectory) -> messages.KeyDeal:
        own = self._name(self._index)
        secret = bytearray(self._random_bytes(GROUP_KEY_BYTES))
        group_key = GroupKey(secret, session=self._session, directory=directory.digest, dealer=own)
        key = CkksKey.generate(self._session.parameters)
        envelope = group_key.close(key.to_bytes())
        sealed = []
        for member in directory.members:
            if member == self._index:
                continue
            channel_secret = shared_secret(self._channel.private, directory.channel_keys[member])
            sealed.append(
                seal_group_key(
                    secret,
                    channel_secret,
                    session=self._session,
                    directory=directory.digest,
                    sender=own,
                    receiver=self._name(member),
                )
            )
            wipe(channel_secret)
        self._group_key, self._ckks_key = group_key, key
        self._deal = messages.deal_to_sign(
            self._session,
            directory=directory.digest,
            sender=self._index,
            commitment=group_key.commitment,
            envelope=envelope,
            sealed_digest=sealed_keys_digest(sealed),
        )
        return messages.KeyDeal(
            session=self._session.digest,
            sender=self._index,
            commitment=group_key.commitment,
            envelope=envelope,
            sealed=b"".join(sealed),
            signature=self._identity.sign(self._deal),
        )

    def _open_inbox(self, inbox: bytes) -> CkksKey:
        directory, session = self._checked_directory(), self._session
        body = session.parameters.largest_key_bytes + ENVELOPE_OVERHEAD_BYTES + messages.SEALED_KEY_BYTES
        message = messages.decode(inbox, messages.KeyInbox, session, body_bytes=body)
        sharers = decode_set(message.sharers, session.context)
        if self._index not in sharers or not set(sharers) <= set(directory.members):
            raise TranscriptMismatch("the list of those who go on lacks this client or names an outsider")
        if directory.dealer not in sharers:
            raise DealerMissing("the client that was to deal the CKKS key is not among those who go on")
        self._require_enough(sharers, "go on")
        deal = messages.deal_to_sign(
            session,
            directory=directory.digest,
            sender=directory.dealer,
            commitment=message.commitment,
            envelope=message.envelope,
            sealed_digest=message.sealed_digest,
        )
        dealer = self._name(directory.dealer)
        self._roster.verify(dealer, deal, message.signature)
        self._sharers = sharers
        if directory.dealer == self._index:
            if self._ckks_key is None or deal != self._deal:
                raise TranscriptMismatch("the inbox holds another deal than the one this client made")
            wipe(self._channel.private)
            return self._ckks_key
        channel_secret = shared_secret(self._channel.private, directory.channel_keys[directory.dealer])
        wipe(self._channel.private)
        secret = unseal_group_key(
            message.sealed,
            channel_secret,
            session=session,
            directory=directory.digest,
            sender=dealer,
            receiver=self._name(self._index),
        )
        wipe(channel_secret)
        self._group_key = GroupKey(secret, session=session, directory=directory.digest, dealer=dealer)
        if not self._group_key.matches(message.commitment):
            raise KeyRejected(f"{dealer!r} sealed another group key than the one it committed to")
        self._deal = deal
        return CkksKey.from_bytes(self._group_key.open(message.envelope), session.parameters)

    def _check_confirmations(self, confirmations: bytes) -> list[bytes]:
        session = self._session
        body = len(self._survivors) * SIGNATURE_BYTES + messages.largest_vector_bytes(session.parameters)
        message = messages.decode(confirmations, messages.CkksConfirmations, session, body_bytes=body)
        confirmed = decode_set(message.confirmed, session.context)
        if not set(confirmed) <= set(self._survivors):
            raise TranscriptMismatch("a client confirmed that is not in the survivor list this client was shown")
        signatures = split_records(message.signatures, count=len(confirmed), size=SIGNATURE_BYTES, what="signatures")
        for member, signature in zip(confirmed, signatures, strict=True):
            try:
                self._roster.verify(self._name(member), self._statement, signature)
            except SignatureInvalid:
                raise TranscriptMismatch(
                    f"client {self._name(member)!r} did not sign the survivors and the sum that this client was shown",
                    hint="the server showed two lists, or a message was altered; nothing was decrypted",
                ) from None
        if len(confirmed) < session.quorum:
            raise BelowThreshold(f"{len(confirmed)} clients confirmed the survivor list; {session.quorum} are needed")
        if messages.ciphertexts_digest(message.total) != self._total:
            raise TranscriptMismatch("the encrypted sum is not the one that was signed")
        return messages.unpack_ciphertexts(message.total, session.parameters)

    def _checked_directory(self) -> CkksDirectory:
        if self._directory is None:
            raise ProtocolStateError("no key directory was accepted yet")
        return self._directory

    def _erase(self) -> None:
        wipe(self._channel.private)
        if self._group_key is not None:
            wipe(self._group_key.secret)
        self._group_key = self._ckks_key = self._opened = None
