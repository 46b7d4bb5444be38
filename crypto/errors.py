"""Every error the protocol can raise.

    CryptoError
    ├── ParameterError            an argument, a context, a roster or a key file is not acceptable
    │   └── InsecureParameters    ... or a lattice modulus too large for 128-bit security
    ├── CkksUnavailable           CKKS was asked for, and TenSEAL is not installed
    ├── InvalidShare              bytes that are no share, or shares that give no secret
    ├── EncodingError             values cannot be put into the ring, or a sum cannot come out of it
    ├── ProtocolStateError        a method was called out of order, or a machine was used twice
    ├── PolicyViolation           a client declines a round that its own policy forbids
    │   └── RoundReplayed         ... because it has seen the round before
    ├── MessageError              received bytes were rejected
    │   ├── MalformedMessage      not the one canonical encoding of the message expected now
    │   ├── WrongSession          made for another run, round, attempt, model, cohort or parameters
    │   ├── UnknownSender         from somebody who has no part in this phase
    │   ├── DuplicateMessage      a second message of one client in one phase
    │   ├── SignatureInvalid      not signed by the key that the roster names
    │   ├── DuplicateKey          a public key that is already another one's
    │   ├── UnsafePublicKey       an X25519 key of low order, or in a second encoding
    │   └── TranscriptMismatch    made by a client that saw other keys, peers or survivors
    └── ProtocolAbort             the round is over and nothing was revealed
        ├── BelowThreshold        fewer clients are left than the threshold or the minimum allows
        ├── OwnKeysMissing        the key directory lacks the client's own advertisement, or has another one
        ├── ShareRejected         a sealed share does not open, or holds no share
        ├── SurvivorsRejected     the survivor list is impossible: it lacks the client, or names an outsider
        ├── ReconstructionFailed  shares do not give the secret that its owner committed to
        ├── DealerMissing         the client that was to deal the CKKS key fell silent
        ├── KeyRejected           the dealt CKKS key does not open, or is not the one that was committed to
        └── DecryptionDisputed    too few clients agree on what the encrypted sum decrypts to

What an error means for the machine that raised it: a *server* that raises a `MessageError` has ignored the
message and goes on, as if the client had stayed silent. Every other error of a server, apart from
`ProtocolStateError` and `ParameterError`, ends it. A *client* that raises a `MessageError` or a
`ProtocolAbort` has wiped its secrets and is over: a client never gives a server a second try.
"""

from __future__ import annotations

from collections.abc import Sequence


class CryptoError(Exception):
    """An error with what was given, the rule it broke, and what to do about it.

    Attributes:
        message: one line, what was given and the rule.
        hint: one line, a way out; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ParameterError(CryptoError):
    """An argument, a context, a roster or a key file is not acceptable."""


class InsecureParameters(ParameterError):
    """A modulus is too large for its polynomial degree: the scheme would have less than 128 bits of security."""


class CkksUnavailable(CryptoError):
    """CKKS was asked for, and TenSEAL is not installed."""


class InvalidShare(CryptoError):
    """Bytes encode no element of the sharing field, or shares give no 32-byte secret."""


class EncodingError(CryptoError):
    """Values cannot be put into the ring, or a sum cannot come out of it."""


class ProtocolStateError(CryptoError):
    """A method was called out of order, or a single-use machine was used twice."""


class PolicyViolation(CryptoError):
    """A client declines a round that its own policy forbids, whatever the server says."""


class RoundReplayed(PolicyViolation):
    """A client declines a round that it has already taken part in."""


class MessageError(CryptoError):
    """Received bytes were rejected."""


class MalformedMessage(MessageError):
    """Bytes are not the one canonical encoding of the message expected now."""


class WrongSession(MessageError):
    """A message was made for another run, round, attempt, model, cohort or set of parameters."""


class UnknownSender(MessageError):
    """A message came from somebody who has no part in this phase."""


class DuplicateMessage(MessageError):
    """A client sent a second message in one phase."""


class SignatureInvalid(MessageError):
    """A message is not signed by the key that the roster names for its sender."""


class DuplicateKey(MessageError):
    """A public key in an advertisement is already in use by another one."""


class UnsafePublicKey(MessageError):
    """An X25519 public key has low order, so that its secrets are known to everybody, or is not canonical."""


class TranscriptMismatch(MessageError):
    """A message was made by a client that saw other keys, peers or survivors than its receiver did."""


class ProtocolAbort(CryptoError):
    """The round is over; nothing was revealed."""


class BelowThreshold(ProtocolAbort):
    """Fewer clients are left than the threshold or the minimum of survivors allows."""


class OwnKeysMissing(ProtocolAbort):
    """The key directory lacks the client's own advertisement, or holds another one in its place."""


class ShareRejected(ProtocolAbort):
    """A sealed share does not open under its sender's key and this transcript, or holds no share."""


class SurvivorsRejected(ProtocolAbort):
    """The survivor list is impossible: it lacks the client itself, or names somebody who shared no keys."""


class ReconstructionFailed(ProtocolAbort):
    """Shares do not give the secret that its owner committed to: somebody sent a false share.

    Attributes:
        owner: whose secret was to be rebuilt.
        holders: whose shares were used; at least one of them, or the owner, deviated from the protocol.
    """

    def __init__(self, message: str, *, owner: str, holders: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.owner = owner
        self.holders = tuple(holders)


class DealerMissing(ProtocolAbort):
    """The client that was to deal the CKKS key fell silent; another attempt has another directory, hence a new draw."""


class KeyRejected(ProtocolAbort):
    """The dealt CKKS key does not open under this transcript, or is not the one that the dealer committed to."""


class DecryptionDisputed(ProtocolAbort):
    """Too few clients agree on what the encrypted sum decrypts to: somebody lied, or too many fell silent.

    Attributes:
        largest: how many gave the same answer.
        answers: how many answered.
    """

    def __init__(self, message: str, *, largest: int, answers: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.largest = largest
        self.answers = answers
