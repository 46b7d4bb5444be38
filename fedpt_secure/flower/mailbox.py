"""Flower's grid as a mailbox in which one sender cannot hold up, or pose as, another.

Flower's own `Grid.pull_messages` waits up to two hours for a reply whose content its sender announced and does not
send, loses all replies of a call when one of them is malformed, and takes from inside a reply, where its sender can
write what it likes, to which message it belongs. So replies are fetched here, piece by piece as the pieces come, and
belong to what the SuperLink has them filed under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedpt_secure.errors import RoundError
from fedpt_secure.flower.arriving import Arriving
from fedpt_secure.flower.grid_transport import Delivery
from fedpt_secure.flower.messages import REPLY, REQUEST, pack, unpack

if TYPE_CHECKING:
    from flwr.superlink.grid import HttpGrid


class FlowerMailbox:
    """A `Mailbox` over the grid of a ServerApp's run."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._sent: dict[str, int] = {}
        self._arriving: dict[str, Arriving] = {}

    def nodes(self) -> frozenset[int]:
        """Those that the SuperLink has heard of lately: it notices after about a minute that one is gone."""
        return frozenset(self._grid.get_node_ids())

    def send(self, kind: str, bodies: Mapping[int, bytes], *, ttl: float) -> dict[str, int]:
        """One push for all. Nodes that the SuperLink does not take a message for are left out."""
        from flwr.app import Message

        nodes = list(bodies)
        messages = [
            Message(pack(REQUEST, bodies[node]), dst_node_id=node, message_type=kind, ttl=ttl) for node in nodes
        ]
        pushed = self._grid.push_messages(messages)
        sent = {message: node for message, node in zip(pushed, nodes, strict=False) if message}
        self._sent.update(sent)
        return sent

    def collect(self, messages: Iterable[str]) -> list[Delivery]:
        """Claim replies that the SuperLink has, fetch their objects as far as they are there."""
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        wanted = [message for message in messages if message in self._sent and message not in self._arriving]
        deliveries: list[Delivery] = []
        if wanted:
            found = self._client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
            for reply, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                message, sender = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
                node = self._sent.get(message)
                if node is None or message in self._arriving:
                    continue
                if reply.HasField("error"):
                    # The SuperLink's own word, that nobody will answer, or the node's.
                    deliveries.append(Delivery(message, node if sender == node else None, None))
                elif sender not in (node, SUPERLINK_NODE_ID):
                    deliveries.append(Delivery(message, sender, None))
                else:
                    self._arriving[message] = Arriving(
                        self._client, tree, node=self._grid.node, run_id=self._grid.run.run_id
                    )
        return deliveries + self._fetched()

    def forget(self, messages: Iterable[str]) -> None:
        """Drop what is known of these messages; their replies expire in the SuperLink."""
        for message in messages:
            self._sent.pop(message, None)
            self._arriving.pop(message, None)

    @property
    def _client(self) -> Any:
        return self._grid._runtime_client

    def _fetched(self) -> list[Delivery]:
        deliveries = []
        for message, arriving in list(self._arriving.items()):
            try:
                whole = arriving.fetch()
                content = _reply_of(arriving.message()) if whole else None
            except RoundError:
                whole, content = True, None
            if whole:
                deliveries.append(Delivery(message, self._sent[message], content))
                self.forget([message])
        return deliveries


def _reply_of(message: Any) -> bytes:
    return unpack(message.content if message.has_content() else None, REPLY)
