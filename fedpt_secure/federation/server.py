"""The server's side of a round. It takes clients' bytes and yields their sum; it has no path to one client's update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import (
    MessageError,
    Roster,
    RoundContext,
    default_threshold,
)
from fedpt_secure.federation.aggregation import aggregation_of
from fedpt_secure.federation.announcement import PROTOCOL, Announcement, agreed_digest
from fedpt_secure.federation.mechanisms import RoundMechanism
from fedpt_secure.federation.protocol_errors import as_round_error


@dataclass(frozen=True, slots=True)
class RoundAggregate:
    """What a completed round reveals: the mean update `[d]` over the survivors, and who they are.

    Attributes:
        clip_norm: of the next round.
        trained: entries that some survivor trained, `[d]`; all of them if None.
    """

    mean_update: npt.NDArray[np.float64]
    clip_norm: float
    survivors: tuple[str, ...]
    trained: npt.NDArray[np.bool_] | None = None


class AggregationServer:
    """Runs one round's phases over bytes. One instance per round.

    **Guarantees** What it keeps of masked (or encrypted) vectors is their running sum. Opening that sum needs at least
    the threshold of clients to have confirmed the same list of survivors.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        config_digest: bytes,
        run_id: bytes,
        round_index: int,
        attempt: int,
        cohort: Sequence[str],
        roster: Roster,
        adapter: npt.NDArray[np.float32],
        model_digest: bytes,
        mechanism: RoundMechanism,
        clip_norm: float,
        contributors: Callable[[Sequence[str]], npt.NDArray[np.float64] | None] = lambda survivors: None,
    ) -> None:
        """Begin a round.

        Args:
            contributors: how many of the survivors train each entry of the adapter, by the public plan; None for all.
        """
        federation = config.federation
        threshold = default_threshold(len(cohort))
        self.context = RoundContext(
            run_id=run_id,
            round_index=round_index,
            attempt=attempt,
            cohort=tuple(cohort),
            roster_digest=roster.digest,
            model_digest=agreed_digest(model_digest, config_digest),
            vector_length=mechanism.vector_length,
            ring_bits=federation.ring_bits,
            threshold=threshold,
            minimum_survivors=federation.minimum_survivors or threshold,
        )
        self._mechanism = mechanism
        self._clip_norm = clip_norm
        self._contributors = contributors
        self._protocol = aggregation_of(config).server(context=self.context, roster=roster)
        self.rejected: list[str] = []
        """One line per message that was refused; its sender counts as silent."""
        self.announcement = Announcement(
            protocol=PROTOCOL,
            run_id=run_id,
            round_index=round_index,
            attempt=attempt,
            cohort=tuple(cohort),
            threshold=threshold,
            minimum_survivors=self.context.minimum_survivors,
            ring_bits=federation.ring_bits,
            config_digest=config_digest,
            clip_norm=clip_norm,
            adapter=np.ascontiguousarray(adapter, dtype="<f4").tobytes(),
        ).to_bytes()

    def receive(self, phase: str, client_id: str, message: bytes) -> None:
        """Take one client's message of a phase: advertise, share_keys, mask, confirm or unmask.

        A message that does not verify is refused and recorded; the round goes on without its sender.

        Raises:
            RoundError: the round cannot go on.
        """
        receivers = {
            "advertise": self._protocol.receive_advertisement,
            "share_keys": self._protocol.receive_shares,
            "mask": self._protocol.receive_masked,
            "confirm": self._protocol.receive_confirmation,
            "unmask": self._protocol.receive_unmasking,
        }
        with as_round_error(f"{phase} from {client_id}"):
            try:
                receivers[phase](client_id, message)
            except MessageError as error:
                self.rejected.append(f"{phase} from {client_id}: {error.message}")

    def publish_keys(self) -> bytes:
        """Close `advertise`; the directory of signed keys, for everybody who advertised."""
        with as_round_error():
            return self._protocol.publish_keys()

    def route_shares(self) -> Mapping[str, bytes]:
        """Close `share_keys`; each client's inbox of sealed shares."""
        with as_round_error():
            return self._protocol.route_shares()

    def publish_survivors(self) -> bytes:
        """Close `mask`; the list of those whose masked vector arrived."""
        with as_round_error():
            return self._protocol.publish_survivors()

    def publish_confirmations(self) -> bytes:
        """Close `confirm`; the signatures on the list."""
        with as_round_error():
            return self._protocol.publish_confirmations()

    def aggregate(self) -> RoundAggregate:
        """Close `unmask`; the mean update over the survivors."""
        with as_round_error():
            total = self._protocol.aggregate()
            survivors = tuple(self._protocol.survivors)
            contributors = self._contributors(survivors)
            decoded = self._mechanism.decode(
                total, survivors=len(survivors), clip_norm=self._clip_norm, contributors=contributors
            )
        trained = None if contributors is None else contributors > 0
        return RoundAggregate(decoded.mean_update, decoded.clip_norm, survivors, trained)
