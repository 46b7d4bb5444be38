"""What one round of secure aggregation is about; everything that is signed or derived in it is bound to this."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from fedpt_secure.crypto.errors import MalformedMessage, ParameterError, UnknownSender
from fedpt_secure.crypto.identities import LARGEST_ROSTER, Roster, check_client_id
from fedpt_secure.crypto.labels import DIGEST_BYTES, PROTOCOL_VERSION, SUITE, Label, digest, integer
from fedpt_secure.crypto.packing import LARGEST_RING_BITS, SMALLEST_RING_BITS
from fedpt_secure.crypto.structs import resolved

RUN_ID_BYTES: Final = 16
LARGEST_VECTOR: Final = 1 << 31
_LARGEST_COUNTER: Final = 1 << 32
_LARGEST_ENCODING: Final = 16 << 20


def default_threshold(holders: int) -> int:
    """floor(2n/3) + 1 of n share holders, as in Bonawitz et al. 2017 for a malicious server.

    It tolerates fewer than n/3 colluding clients, since 2t > n + n_C, and a third of the clients, less one, may vanish.
    """
    return 2 * holders // 3 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundContext:
    """One round: frozen, validated, the same for every party or nothing will fit together.

    A client builds or checks the context itself. It takes the model digest from the weights it was given, the
    roster digest from its own roster, and the rest from whoever proposes the round, within what its
    `ClientPolicy` accepts.

    Attributes:
        run_id: 16 random bytes, fresh for each training run.
        round_index: the round in the run, from 0.
        attempt: how often the round was started before, from 0; every attempt is a session of its own.
        cohort: ids of the clients that are invited; sorted on construction, so that their order says nothing.
        roster_digest: `Roster.digest` of the roster that pins the cohort's identities.
        model_digest: SHA-256 of the global weights that clients train from.
        vector_length: elements of the vector that is summed.
        ring_bits: b of Z_{2^b}, 16 to 64.
        threshold: shares that rebuild a secret; a client's shares lie with its neighbours and itself.
        minimum_survivors: masked vectors below which the round is abandoned; in the k-regular graph also the
            signatures that a survivor list needs.
        degree: neighbours of each client in the k-regular graph, an even number; None for the complete graph.
    """

    run_id: bytes
    round_index: int
    attempt: int = 0
    cohort: tuple[str, ...]
    roster_digest: bytes
    model_digest: bytes
    vector_length: int
    ring_bits: int = 32
    threshold: int
    minimum_survivors: int
    degree: int | None = None
    session_digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cohort", tuple(sorted(self.cohort)))
        problems = list(self._problems())
        if problems:
            raise ParameterError("; ".join(problems), hint="a round's context is checked before any key is made")
        object.__setattr__(self, "session_digest", self._digest())

    def _problems(self) -> Iterable[str]:
        for name, value, size in (
            ("run_id", self.run_id, RUN_ID_BYTES),
            ("roster_digest", self.roster_digest, DIGEST_BYTES),
            ("model_digest", self.model_digest, DIGEST_BYTES),
        ):
            if not isinstance(value, bytes) or len(value) != size:
                yield f"{name} must be {size} bytes"
        if self.degree is not None and not isinstance(self.degree, int):
            yield f"degree is {self.degree!r}; it must be an integer, or None for the complete graph"
            return
        size = len(self.cohort)
        if not 2 <= size <= LARGEST_ROSTER:
            yield f"the cohort has {size} clients; it needs 2 to {LARGEST_ROSTER}"
        if len(set(self.cohort)) != size:
            yield "a client stands in the cohort twice"
        for client_id in self.cohort:
            try:
                check_client_id(client_id)
            except ParameterError as error:
                yield error.message
        for name, number, least, most in (
            ("round_index", self.round_index, 0, _LARGEST_COUNTER),
            ("attempt", self.attempt, 0, _LARGEST_COUNTER),
            ("vector_length", self.vector_length, 1, LARGEST_VECTOR),
            ("ring_bits", self.ring_bits, SMALLEST_RING_BITS, LARGEST_RING_BITS),
            ("threshold", self.threshold, 2, self.holders),
            ("minimum_survivors", self.minimum_survivors, 2, size),
        ):
            if not isinstance(number, int) or not least <= number <= most:
                yield f"{name} is {number!r}; it must lie in {least}..{most}"
        if self.degree is not None and (self.degree % 2 or not 2 <= self.degree < size - 1):
            yield f"degree is {self.degree}; it must be even and in 2..{size - 2}, or None for the complete graph"
        if self.degree is not None and 2 * self.minimum_survivors <= size:
            yield f"minimum_survivors is {self.minimum_survivors}; in a k-regular graph it must exceed half the cohort"

    def _digest(self) -> bytes:
        parts = [
            integer(PROTOCOL_VERSION),
            SUITE.encode(),
            self.run_id,
            integer(self.round_index),
            integer(self.attempt),
            self.roster_digest,
            self.model_digest,
            integer(self.vector_length),
            integer(self.ring_bits),
            integer(self.threshold),
            integer(self.minimum_survivors),
            integer(self.degree or 0),
        ]
        return digest(Label.SESSION, parts + [client_id.encode() for client_id in self.cohort])

    @property
    def holders(self) -> int:
        """Clients that hold shares of one client's secrets if all take part: its neighbours and itself."""
        return len(self.cohort) if self.degree is None else self.degree + 1

    @property
    def quorum(self) -> int:
        """Signatures on one survivor list without which no client releases anything.

        2 quorum > n + corrupt clients makes the list the same for all honest clients. In the complete graph the
        threshold has that property; in the k-regular one, where it is about neighbours, the minimum of survivors does.
        """
        return self.threshold if self.degree is None else self.minimum_survivors

    def index_of(self, client_id: str) -> int:
        """The position of a client in the cohort, which stands for it on the wire.

        Raises:
            UnknownSender: the client is not in the cohort.
        """
        index = bisect_left(self.cohort, client_id)
        if index == len(self.cohort) or self.cohort[index] != client_id:
            raise UnknownSender(f"client {client_id!r} is not in the cohort of this round")
        return index

    def check_roster(self, roster: Roster) -> None:
        """Accept a roster that is the one this round names, and that names the whole cohort.

        Raises:
            ParameterError: it is another one, or a client of the cohort is not in it.
        """
        if roster.digest != self.roster_digest:
            raise ParameterError(
                "the round names another roster than this side holds",
                hint="compare the roster's digest on both sides, over a channel that the server does not control",
            )
        strangers = [client_id for client_id in self.cohort if client_id not in roster]
        if strangers:
            raise ParameterError(
                f"{len(strangers)} clients of the cohort are not in the roster, first {strangers[0]!r}"
            )

    def to_bytes(self) -> bytes:
        """The canonical encoding, for whoever proposes a round."""
        return msgspec.msgpack.encode(
            _Proposal(
                version=PROTOCOL_VERSION,
                suite=SUITE,
                run_id=self.run_id,
                round_index=self.round_index,
                attempt=self.attempt,
                cohort=list(self.cohort),
                roster_digest=self.roster_digest,
                model_digest=self.model_digest,
                vector_length=self.vector_length,
                ring_bits=self.ring_bits,
                threshold=self.threshold,
                minimum_survivors=self.minimum_survivors,
                degree=self.degree,
            )
        )

    @classmethod
    def from_bytes(cls, encoded: bytes) -> RoundContext:
        """The context that `to_bytes` encoded. Whoever receives it still has to compare the digests with its own.

        Raises:
            MalformedMessage: not the canonical encoding of a context of this protocol version and suite.
            ParameterError: its values are not acceptable.
        """
        if not isinstance(encoded, bytes):
            raise MalformedMessage(f"a round context is read from bytes, not from a {type(encoded).__name__}")
        if len(encoded) > _LARGEST_ENCODING:
            raise MalformedMessage(f"a round context has at most {_LARGEST_ENCODING} bytes, not {len(encoded)}")
        try:
            proposal = msgspec.msgpack.decode(encoded, type=_Proposal)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedMessage(f"not a round context: {error}") from None
        if (proposal.version, proposal.suite) != (PROTOCOL_VERSION, SUITE):
            raise MalformedMessage(
                f"the round uses protocol version {proposal.version} with {proposal.suite[:80]!r}; "
                f"this side speaks version {PROTOCOL_VERSION} with {SUITE!r}"
            )
        context = cls(
            run_id=proposal.run_id,
            round_index=proposal.round_index,
            attempt=proposal.attempt,
            cohort=tuple(proposal.cohort),
            roster_digest=proposal.roster_digest,
            model_digest=proposal.model_digest,
            vector_length=proposal.vector_length,
            ring_bits=proposal.ring_bits,
            threshold=proposal.threshold,
            minimum_survivors=proposal.minimum_survivors,
            degree=proposal.degree,
        )
        if context.to_bytes() != encoded:
            raise MalformedMessage("a round context is not in its canonical encoding")
        return context


@resolved
class _Proposal(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: int
    suite: str
    run_id: bytes
    round_index: int
    attempt: int
    cohort: list[str]
    roster_digest: bytes
    model_digest: bytes
    vector_length: int
    ring_bits: int
    threshold: int
    minimum_survivors: int
    degree: int | None
