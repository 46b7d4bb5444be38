"""Flower's grid as a mailbox in which one sender cannot hold up, or pose as, another.

Flower's own `Grid.pull_messages` waits up to two hours for a reply whose content its sender announced and does not
send, loses all replies of a call when one of them is malformed, and takes from inside a reply, where its sender can
write what it likes, to which message it belongs. So replies are fetched here, piece by piece as the pieces come, and
belong to what the SuperLink has them filed under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpt_secure.errors import RoundError
from fedpt_secure.flower.grid_transport import Delivery
from fedpt_secure.flower.messages import LARGEST_MESSAGE, REPLY, REQUEST, pack, unpack

if TYPE_CHECKING:
    from flwr.superlink.grid import HttpGrid

_LARGEST_TREE = 8
"""Objects of a reply: the message, its dictionary, its record."""


@dataclass(slots=True)
class _Arriving:
    """A reply whose objects are being fetched."""

    root: str
    node: int
    message: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(map(len, self.contents.values()))


class FlowerMailbox:
    """A `Mailbox` over the grid of a ServerApp's run."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._sent: dict[str, int] = {}
        self._arriving: dict[str, _Arriving] = {}

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
                    self._arriving[message] = _Arriving(tree.object_id, node, message, _object_ids(tree))
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
                whole = self._fetch(arriving)
                content = self._inflated(arriving) if whole else None
            except RoundError:
                whole, content = True, None
            if whole:
                deliveries.append(Delivery(message, arriving.node, content))
                self.forget([message])
        return deliveries

    def _fetch(self, arriving: _Arriving) -> bool:
        """Fetch the objects that are there; whether all are.

        Raises:
            RoundError: they are too large, too many, or will not come.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        if not 1 <= len(arriving.missing) + len(arriving.contents) <= _LARGEST_TREE:
            raise RoundError("a reply of too many objects")
        for name in tuple(arriving.missing):
            answer = self._client.PullObject(
                PullObjectRequest(node=self._grid.node, run_id=self._grid.run.run_id, object_id=name)
            )
            if not answer.object_found:
                raise RoundError("a reply whose content is gone")
            if not answer.object_available:
                return False
            arriving.missing.remove(name)
            arriving.contents[name] = answer.object_content
            if arriving.size > LARGEST_MESSAGE:
                raise RoundError("a reply of too many bytes")
        return True

    def _inflated(self, arriving: _Arriving) -> bytes:
        """The bytes in a reply that is complete.

        Raises:
            RoundError: it holds something else.
        """
        from flwr.app import Message
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=arriving.root
            )
        )
        try:
            message = inflate_object_from_contents(arriving.root, arriving.contents)
        except Exception as error:  # whatever Flower's decoders make of what a stranger sent
            raise RoundError(f"a reply that cannot be decoded: {type(error).__name__}") from None
        if not isinstance(message, Message) or not message.has_content():
            raise RoundError("a reply without content")
        return unpack(message.content, REPLY)


def _object_ids(tree: Any) -> list[str]:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    names: list[str] = []
    for node in iterate_object_tree(tree):
        names.append(node.object_id)
        if len(names) > _LARGEST_TREE:
            break
    return list(dict.fromkeys(names))
