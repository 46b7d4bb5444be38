"""The server's side of one round under CKKS: a sans-IO, single-use state machine that never holds the key.

It adds ciphertexts as they arrive and keeps their running sum and one digest each. The key passes through it only
inside envelopes that it cannot open. Which sum comes out, clients say: a quorum must have decrypted to the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import wraps
from threading import RLock
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto import ckks_messages as messages
from fedpt_secure.crypto.ckks import EncryptedSum, unflooded
from fedpt_secure.crypto.ckks_keys import (
    ENVELOPE_OVERHEAD_BYTES,
    CkksDirectory,
    check_advertisement,
    sealed_keys_digest,
)
from fedpt_secure.crypto.ckks_messages import CkksSession
from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import (
    BelowThreshold,
    DealerMissing,
    DecryptionDisputed,
    DuplicateMessage,
    MalformedMessage,
    ProtocolStateError,
    TranscriptMismatch,
    UnknownSender,
)
from fedpt_secure.crypto.identities import Roster
from fedpt_secure.crypto.labels import CkksLabel, digest
from fedpt_secure.crypto.messages import encode_set, split_records
from fedpt_secure.crypto.server import ServerState

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """A method that no other one overlaps: of two threads that add at once, one's vector could be twice in the sum."""

    @wraps(method)
    def alone(server: CkksServer, *arguments: Any, **settings: Any) -> Any:
        with server._turn:
            return method(server, *arguments, **settings)

    return cast(_Method, alone)


class CkksServer:
    """The server in one round; phases, methods and errors are those of `SecAggServer`.

    **Guarantees** A sum that comes out was decrypted alike by a quorum of clients, each of which signed it, so that
    fewer liars than the quorum cannot change it. Memory does not grow with the number of vectors, but for a few hundred
    bytes of keys, digests and signatures each.

    Args:
        context: the round; its `threshold` is the quorum.
        parameters: fitted to the round.
        roster: identities of the cohort.

    Raises:
        ParameterError: roster, context and parameters do not belong together.
        CkksUnavailable: TenSEAL is not installed.
    """

    def __init__(self, *, context: RoundContext, parameters: CkksParameters, roster: Roster) -> None:
        context.check_roster(roster)
        self._session = CkksSession(context, parameters)
        self._context = context
        self._roster = roster
        self._turn = RLock()
        self._state = ServerState.ADVERTISING
        self._advertisements: dict[int, messages.CkksAdvertisement] = {}
        self._channel_keys: set[bytes] = set()
        self._directory: CkksDirectory | None = None
        self._deal: messages.KeyDeal | None = None
        self._deal_digest = b""
        self._sealed: dict[int, bytes] = {}
        self._ready: set[int] = set()
        self._sharers: tuple[int, ...] = ()
        self._total: EncryptedSum | None = EncryptedSum(parameters)
        self._digests: dict[int, bytes] = {}
        self._survivors: tuple[int, ...] = ()
        self._published = b""
        self._statement = b""
        self._confirmations: dict[int, bytes] = {}
        self._answers: dict[int, bytes] = {}
        self._leading = _LeadingAnswer()
        self._liars: tuple[int, ...] = ()

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
        """Clients that go on with the dealt key; empty before it is routed."""
        return self._names(self._sharers)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Clients whose vectors are in the sum; empty before the list is published."""
        return self._names(self._survivors)

    @property
    def liars(self) -> tuple[str, ...]:
        """Clients that decrypted to something else than the quorum; known once the sum is."""
        return self._names(self._liars)

    @_one_at_a_time
    def receive_advertisement(self, client_id: str, message: bytes) -> None:
        """Phase 1: take one client's channel key.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        everybody = range(len(self._context.cohort))
        sender = self._expect(ServerState.ADVERTISING, client_id, everybody, self._advertisements)
        advertisement = messages.decode(message, messages.CkksAdvertisement, self._session)
        self._check_sender(advertisement.sender, sender)
        check_advertisement(advertisement, self._session, self._roster, known_keys=self._channel_keys)
        self._channel_keys.add(advertisement.channel_key)
        self._advertisements[sender] = advertisement

    @_one_at_a_time
    def publish_keys(self) -> bytes:
        """Close phase 1: the key directory, the same bytes for every member.

        Raises:
            BelowThreshold: too few clients advertised.
        """
        self._require_state(ServerState.ADVERTISING)
        self._require_enough(self._advertisements, "advertised keys")
        self._directory = CkksDirectory(self._advertisements, self._session)
        self._state = ServerState.SHARING
        return self._directory.to_bytes()

    @_one_at_a_time
    def receive_shares(self, client_id: str, message: bytes) -> None:
        """Phase 2: take the dealer's sealed keys, or another client's word that it is ready.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        directory = self._checked_directory(ServerState.SHARING)
        sender = self._expect(ServerState.SHARING, client_id, directory.members, self._ready)
        if sender == directory.dealer:
            self._take_deal(client_id, message, directory)
        else:
            ready = messages.decode(message, messages.KeyReady, self._session)
            self._check_sender(ready.sender, sender)
            signed = messages.ready_to_sign(self._session, directory=directory.digest, sender=sender)
            self._roster.verify(client_id, signed, ready.signature)
        self._ready.add(sender)

    @_one_at_a_time
    def route_shares(self) -> dict[str, bytes]:
        """Close phase 2: one inbox for each client that answered, by client id.

        Raises:
            DealerMissing: the dealer did not answer.
            BelowThreshold: too few clients did.
        """
        directory = self._checked_directory(ServerState.SHARING)
        deal = self._deal
        if deal is None:
            self._abort()
            raise DealerMissing(
                f"client {self._context.cohort[directory.dealer]!r} was to deal the CKKS key and fell silent",
                hint="start another attempt: another directory draws another dealer",
            )
        self._require_enough(self._ready, "are ready")
        self._sharers = tuple(sorted(self._ready))
        inboxes = {}
        for receiver in self._sharers:
            inbox = messages.KeyInbox(
                session=self._session.digest,
                sharers=encode_set(self._sharers, self._context),
                commitment=deal.commitment,
                envelope=deal.envelope,
                sealed_digest=sealed_keys_digest(list(self._sealed.values())),
                sealed=self._sealed.get(receiver, b""),
                signature=deal.signature,
            )
            inboxes[self._context.cohort[receiver]] = messages.encode(inbox)
        self._deal = None
        self._sealed.clear()
        self._state = ServerState.MASKING
        return inboxes

    @_one_at_a_time
    def receive_masked(self, client_id: str, message: bytes) -> None:
        """Phase 3: add one client's ciphertexts to the running sum.

        Raises:
            MessageError: the message was ignored, the sum is unchanged; the subclass says why.
        """
        self._checked_directory(ServerState.MASKING)
        total = self._running_total()
        sender = self._expect(ServerState.MASKING, client_id, self._sharers, self._digests)
        body = messages.largest_vector_bytes(self._session.parameters)
        vector = messages.decode(message, messages.EncryptedVector, self._session, body_bytes=body)
        self._check_sender(vector.sender, sender)
        ciphertexts = messages.ciphertexts_digest(vector.ciphertexts)
        signed = messages.vector_to_sign(
            self._session, deal=self._deal_digest, sender=sender, sharers=vector.sharers, ciphertexts=ciphertexts
        )
        self._roster.verify(client_id, signed, vector.signature)
        if vector.sharers != encode_set(self._sharers, self._context):
            raise TranscriptMismatch(f"client {client_id!r} was told of other sharers than the server routed to")
        try:
            total.add(messages.unpack_ciphertexts(vector.ciphertexts, self._session.parameters))
        except MalformedMessage:
            raise
        except BaseException:
            # A vector that was added in part, as when memory runs out, must not stay in the sum.
            self._abort()
            raise
        self._digests[sender] = ciphertexts

    @_one_at_a_time
    def publish_survivors(self) -> bytes:
        """Close phase 3: survivors, their ciphertexts' digests and the sum's, the same bytes for every survivor.

        Raises:
            BelowThreshold: too few vectors arrived.
        """
        self._checked_directory(ServerState.MASKING)
        self._require_enough(self._digests, "sent encrypted vectors")
        self._survivors = tuple(sorted(self._digests))
        self._published = messages.pack_ciphertexts(self._running_total().to_bytes())
        self._total = None
        digests = b"".join(self._digests[survivor] for survivor in self._survivors)
        total = messages.ciphertexts_digest(self._published)
        self._statement = messages.survivors_to_sign(
            self._session,
            deal=self._deal_digest,
            sharers=self._sharers,
            survivors=self._survivors,
            digests=digests,
            total=total,
        )
        self._state = ServerState.CONFIRMING
        return messages.encode(
            messages.CkksSurvivors(
                session=self._session.digest,
                survivors=encode_set(self._survivors, self._context),
                digests=digests,
                total=total,
            )
        )

    @_one_at_a_time
    def receive_confirmation(self, client_id: str, message: bytes) -> None:
        """Phase 4: take one survivor's signature on the survivors and the sum.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        sender = self._expect(ServerState.CONFIRMING, client_id, self._survivors, self._confirmations)
        confirmation = messages.decode(message, messages.CkksConfirmation, self._session)
        self._check_sender(confirmation.sender, sender)
        self._roster.verify(client_id, self._statement, confirmation.signature)
        self._confirmations[sender] = confirmation.signature

    @_one_at_a_time
    def publish_confirmations(self) -> bytes:
        """Close phase 4: all signatures and the encrypted sum, the same bytes for everyone that confirmed.

        Raises:
            BelowThreshold: too few survivors confirmed.
        """
        self._require_state(ServerState.CONFIRMING)
        self._require_number(self._confirmations, self._session.quorum, "confirmed the survivor list")
        confirmed = sorted(self._confirmations)
        self._state = ServerState.UNMASKING
        published, self._published = self._published, b""
        return messages.encode(
            messages.CkksConfirmations(
                session=self._session.digest,
                confirmed=encode_set(confirmed, self._context),
                signatures=b"".join(self._confirmations[member] for member in confirmed),
                total=published,
            )
        )

    @_one_at_a_time
    def receive_unmasking(self, client_id: str, message: bytes) -> None:
        """Phase 5: take what one client decrypted the sum to.

        Raises:
            MessageError: the message was ignored; the subclass says why.
        """
        sender = self._expect(ServerState.UNMASKING, client_id, self._confirmations, self._answers)
        body = self._session.parameters.length * messages.ANSWER_BYTES
        answer = messages.decode(message, messages.Decryption, self._session, body_bytes=body)
        self._check_sender(answer.sender, sender)
        signed = messages.decryption_to_sign(
            self._session, statement=self._statement, sender=sender, values=answer.values
        )
        self._roster.verify(client_id, signed, answer.signature)
        values = messages.answer_from_bytes(answer.values, self._session.parameters)
        self._answers[sender] = digest(CkksLabel.ANSWER, (answer.values,))
        self._leading.hear(self._answers[sender], values)

    @_one_at_a_time
    def aggregate(self) -> npt.NDArray[np.float64]:
        """Close phase 5 and the round: the sum of the survivors' vectors, each coordinate within the error bound.

        Returns:
            [length], float64.

        Raises:
            BelowThreshold: too few clients answered.
            DecryptionDisputed: too few of them agree.
        """
        self._require_state(ServerState.UNMASKING)
        quorum = self._session.quorum
        self._require_number(self._answers, quorum, "sent decryptions")
        agreed, votes = Counter(self._answers.values()).most_common(1)[0]
        if votes < quorum:
            self._abort()
            raise DecryptionDisputed(
                f"of {len(self._answers)} clients only {votes} decrypted the sum alike; {quorum} must",
                largest=votes,
                answers=len(self._answers),
                hint="some client lies, or runs TenSEAL on a processor that rounds differently",
            )
        self._liars = tuple(sorted(sender for sender, given in self._answers.items() if given != agreed))
        self._state = ServerState.FINISHED
        return unflooded(self._leading.values(agreed), self._session.parameters)

    def _take_deal(self, client_id: str, message: bytes, directory: CkksDirectory) -> None:
        others = [member for member in directory.members if member != directory.dealer]
        body = len(others) * messages.SEALED_KEY_BYTES
        body += self._session.parameters.largest_key_bytes + ENVELOPE_OVERHEAD_BYTES
        deal = messages.decode(message, messages.KeyDeal, self._session, body_bytes=body)
        self._check_sender(deal.sender, directory.dealer)
        records = list(
            split_records(deal.sealed, count=len(others), size=messages.SEALED_KEY_BYTES, what="sealed group keys")
        )
        signed = messages.deal_to_sign(
            self._session,
            directory=directory.digest,
            sender=directory.dealer,
            commitment=deal.commitment,
            envelope=deal.envelope,
            sealed_digest=sealed_keys_digest(records),
        )
        self._roster.verify(client_id, signed, deal.signature)
        self._deal, self._deal_digest = deal, signed
        self._sealed = dict(zip(others, records, strict=True))

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

    def _checked_directory(self, state: ServerState) -> CkksDirectory:
        self._require_state(state)
        if self._directory is None:
            raise ProtocolStateError("the key directory was not published yet")
        return self._directory

    def _running_total(self) -> EncryptedSum:
        if self._total is None:
            raise ProtocolStateError("there is no sum")
        return self._total

    def _require_enough(self, present: Collection[int], what: str) -> None:
        self._require_number(present, max(self._context.minimum_survivors, self._session.quorum), what)

    def _require_number(self, present: Collection[int], minimum: int, what: str) -> None:
        if len(present) < minimum:
            self._abort()
            raise BelowThreshold(
                f"{len(present)} of {len(self._context.cohort)} clients {what}; the round needs {minimum}"
            )

    def _abort(self) -> None:
        """Leave the protocol: the sum and the sealed keys are gone."""
        self._state = ServerState.ABORTED
        self._total = self._deal = None
        self._published = b""
        self._sealed.clear()

    def _names(self, indices: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._context.cohort[index] for index in indices)


class _LeadingAnswer:
    """The one answer that more than half of all give, if there is one, in the memory of one answer.

    Boyer and Moore's vote (1981): whatever more than half of the calls bring is what is kept at the end. A quorum is
    more than half of the cohort, so what it agrees on is kept.
    """

    def __init__(self) -> None:
        self._lead = 0
        self._digest = b""
        self._values = np.zeros(0, dtype=np.int32)

    def hear(self, answer: bytes, values: npt.NDArray[np.int32]) -> None:
        """Take one answer, by its digest."""
        if answer == self._digest:
            self._lead += 1
        elif self._lead:
            self._lead -= 1
        else:
            self._digest, self._values, self._lead = answer, values, 1

    def values(self, answer: bytes) -> npt.NDArray[np.int32]:
        """The values behind the digest that most gave."""
        if answer != self._digest:
            raise ProtocolStateError("the answer was not kept: it was not given by more than half")
        return self._values
