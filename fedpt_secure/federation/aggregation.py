"""How a round's ring vectors are summed: under pairwise masks, or under CKKS. The rest of a round is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import (
    CkksClient,
    CkksParameters,
    CkksServer,
    CkksUnavailable,
    ClientPolicy,
    FixedPointEncoding,
    Identity,
    RingVector,
    Roster,
    RoundContext,
    RoundRegister,
    SecAggClient,
    SecAggServer,
    require_tenseal,
    ring_dtype,
)
from fedpt_secure.errors import ConfigError
from fedpt_secure.privacy import PrivacyStatement


class AggregationClient(Protocol):
    """A client in one round; `crypto.SecAggClient` says what each call does."""

    def advertise(self) -> bytes: ...
    def share_keys(self, key_directory: bytes) -> bytes: ...
    def open_inbox(self, inbox: bytes) -> None: ...
    def mask(self, inbox: bytes, vector: RingVector) -> bytes: ...
    def confirm(self, survivor_list: bytes) -> bytes: ...
    def unmask(self, confirmations: bytes) -> bytes: ...
    def discard(self) -> None: ...


class AggregationProtocolServer(Protocol):
    """The server in one round; `crypto.SecAggServer` says what each call does."""

    @property
    def survivors(self) -> tuple[str, ...]: ...
    def receive_advertisement(self, client_id: str, message: bytes) -> None: ...
    def publish_keys(self) -> bytes: ...
    def receive_shares(self, client_id: str, message: bytes) -> None: ...
    def route_shares(self) -> Mapping[str, bytes]: ...
    def receive_masked(self, client_id: str, message: bytes) -> None: ...
    def publish_survivors(self) -> bytes: ...
    def receive_confirmation(self, client_id: str, message: bytes) -> None: ...
    def publish_confirmations(self) -> bytes: ...
    def receive_unmasking(self, client_id: str, message: bytes) -> None: ...
    def aggregate(self) -> RingVector: ...


class Aggregation(Protocol):
    """One way to sum.

    Attributes:
        name: as in `federation.aggregator`.
        trust: whom one has to trust, in one sentence.
    """

    name: str
    trust: str

    def client(
        self,
        *,
        context: RoundContext,
        identity: Identity,
        client_id: str,
        roster: Roster,
        policy: ClientPolicy,
        register: RoundRegister,
    ) -> AggregationClient:
        """A client's side of one round."""

    def server(self, *, context: RoundContext, roster: Roster) -> AggregationProtocolServer:
        """The server's side of one round."""


class MaskAggregation:
    """Pairwise masks (docs/protocol.md): the exact sum, and security against a malicious server."""

    name = "masks"
    trust = (
        "the server, malicious or not, learns the sum over the survivors and nothing else, as long as fewer than a "
        "third of a round's clients collude with it"
    )

    def client(self, **round_and_client: Any) -> AggregationClient:
        """See `Aggregation.client`."""
        return SecAggClient(**round_and_client)

    def server(self, *, context: RoundContext, roster: Roster) -> AggregationProtocolServer:
        """See `Aggregation.server`."""
        return SecAggServer(context=context, roster=roster)


class CkksAggregation:
    """CKKS under a key that all clients share and the server lacks (docs/ckks.md): an approximate sum, less security.

    A ring vector's elements are read as signed integers, at most `level` in magnitude each, and encrypted as real
    numbers; the sum's are rounded back.
    """

    name = "ckks"
    trust = (
        "the server is honest but curious and colludes with NO client: every client holds the key that decrypts every "
        "client's update, so one colluding client breaks the privacy of all"
    )

    def client(self, *, context: RoundContext, **client: Any) -> AggregationClient:
        """See `Aggregation.client`."""
        return _RingCkksClient(context=context, **client)

    def server(self, *, context: RoundContext, roster: Roster) -> AggregationProtocolServer:
        """See `Aggregation.server`."""
        return _RingCkksServer(context=context, roster=roster)


class _RingCkksClient(CkksClient):
    def __init__(self, *, context: RoundContext, **client: Any) -> None:
        super().__init__(context=context, parameters=_parameters(context), **client)
        self._ring = _ring(context)

    def mask(self, inbox: bytes, vector: RingVector) -> bytes:
        return super().mask(inbox, self._ring.signed(vector).astype(np.float64))


class _RingCkksServer(CkksServer):
    def __init__(self, *, context: RoundContext, roster: Roster) -> None:
        super().__init__(context=context, parameters=_parameters(context), roster=roster)
        self._ring = _ring(context)

    def aggregate(self) -> RingVector:
        # Noise may carry a sum past what the survivors can reach; the ring's decoder would take it for a cheat.
        most = len(self.survivors) * self._ring.level
        total = np.clip(np.rint(super().aggregate()), -most, most).astype(np.int64)
        return (total & ((1 << self._ring.ring_bits) - 1)).astype(ring_dtype(self._ring.ring_bits))


def _ring(context: RoundContext) -> FixedPointEncoding:
    """How elements of the round's ring are read: signed, and of at most `level` where their sum must not wrap."""
    return FixedPointEncoding(ring_bits=context.ring_bits, bound=1.0, cohort=len(context.cohort))


def _parameters(context: RoundContext) -> CkksParameters:
    return CkksParameters.fitted(
        cohort=len(context.cohort), bound=float(_ring(context).level), length=context.vector_length
    )


def aggregation_of(config: RunConfig) -> Aggregation:
    """The run's way to sum.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    if config.federation.aggregator == "masks":
        return MaskAggregation()
    try:
        require_tenseal()
    except CkksUnavailable as error:
        raise ConfigError(error.message, hint=error.hint) from None
    return CkksAggregation()


def privacy_document(statement: PrivacyStatement, aggregation: Aggregation) -> dict[str, Any]:
    """The content of `privacy.json`: the statement, and what protects updates while they are summed."""
    return statement.to_json() | {"aggregation": {"aggregator": aggregation.name, "trust": aggregation.trust}}
