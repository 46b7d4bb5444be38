"""Secure aggregation: a server learns the sum of its clients' vectors and nothing else.

Pairwise masks with dropout recovery (Bonawitz et al. 2017) in the variant against a malicious server, as
sans-IO, single-use state machines over bytes. `docs/protocol.md` has the messages, the checks and what each
of them defeats. Sums under CKKS, which promise less, lie beside it (`docs/ckks.md`). This package imports
nothing of the rest and no tensor library: it can be read, and audited, alone.
"""

from __future__ import annotations

from fedpt_secure.crypto.ckks import require_tenseal
from fedpt_secure.crypto.ckks_client import CkksClient
from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.ckks_server import CkksServer
from fedpt_secure.crypto.client import SecAggClient
from fedpt_secure.crypto.context import RoundContext, default_threshold
from fedpt_secure.crypto.encoding import FixedPointEncoding
from fedpt_secure.crypto.errors import (
    BelowThreshold,
    CkksUnavailable,
    CryptoError,
    DealerMissing,
    DecryptionDisputed,
    DuplicateKey,
    DuplicateMessage,
    EncodingError,
    InsecureParameters,
    InvalidShare,
    KeyRejected,
    MalformedMessage,
    MessageError,
    OwnKeysMissing,
    ParameterError,
    PolicyViolation,
    ProtocolAbort,
    ProtocolStateError,
    ReconstructionFailed,
    RoundReplayed,
    ShareRejected,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
    UnknownSender,
    UnsafePublicKey,
    WrongSession,
)
from fedpt_secure.crypto.identities import Identity, Roster
from fedpt_secure.crypto.identity_files import (
    NewIdentity,
    OwnIdentity,
    PublicIdentity,
    StoredIdentity,
    create_identity,
    load_identity,
    roster_of,
)
from fedpt_secure.crypto.labels import PROTOCOL_VERSION, SUITE
from fedpt_secure.crypto.packing import ring_dtype
from fedpt_secure.crypto.parameter_report import (
    ClientBytes,
    FailureProbabilities,
    client_bytes,
    failure_probabilities,
)
from fedpt_secure.crypto.parameters import SecureAggregationParameters, secure_aggregation_parameters
from fedpt_secure.crypto.policy import ClientPolicy, MemoryRoundRegister, RoundRegister
from fedpt_secure.crypto.presence import Hello, Presence, proven_id
from fedpt_secure.crypto.prg import RingVector
from fedpt_secure.crypto.randomness import SYSTEM_RANDOM, InsecureDeterministicBytes, RandomBytes
from fedpt_secure.crypto.server import SecAggServer, ServerState
from fedpt_secure.crypto.single_use import ClientState

__all__ = [
    "PROTOCOL_VERSION",
    "SUITE",
    "SYSTEM_RANDOM",
    "BelowThreshold",
    "CkksClient",
    "CkksParameters",
    "CkksServer",
    "CkksUnavailable",
    "ClientBytes",
    "ClientPolicy",
    "ClientState",
    "CryptoError",
    "DealerMissing",
    "DecryptionDisputed",
    "DuplicateKey",
    "DuplicateMessage",
    "EncodingError",
    "FailureProbabilities",
    "FixedPointEncoding",
    "Hello",
    "Identity",
    "InsecureDeterministicBytes",
    "InsecureParameters",
    "InvalidShare",
    "KeyRejected",
    "MalformedMessage",
    "MemoryRoundRegister",
    "MessageError",
    "NewIdentity",
    "OwnIdentity",
    "OwnKeysMissing",
    "ParameterError",
    "PolicyViolation",
    "Presence",
    "ProtocolAbort",
    "ProtocolStateError",
    "PublicIdentity",
    "RandomBytes",
    "ReconstructionFailed",
    "RingVector",
    "Roster",
    "RoundContext",
    "RoundRegister",
    "RoundReplayed",
    "SecAggClient",
    "SecAggServer",
    "SecureAggregationParameters",
    "ServerState",
    "ShareRejected",
    "SignatureInvalid",
    "StoredIdentity",
    "SurvivorsRejected",
    "TranscriptMismatch",
    "UnknownSender",
    "UnsafePublicKey",
    "WrongSession",
    "client_bytes",
    "create_identity",
    "default_threshold",
    "failure_probabilities",
    "load_identity",
    "proven_id",
    "require_tenseal",
    "ring_dtype",
    "roster_of",
    "secure_aggregation_parameters",
]
