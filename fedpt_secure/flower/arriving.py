"""A Flower message whose content arrives in pieces, fetched as they come, without waiting for any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpt_secure.errors import RoundError
from fedpt_secure.flower.messages import LARGEST_MESSAGE

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.supercore.runtime import RuntimeHttpClient

_LARGEST_TREE = 8
"""Objects of a message: itself, its dictionary, its record."""


class Arriving:
    """A message by the tree of its objects.

    Args:
        client: of the runtime API that has the objects.
        tree: Flower's `ObjectTree`.
        node, run_id: in whose name they are asked for.
    """

    def __init__(self, client: RuntimeHttpClient, tree: Any, *, node: Any, run_id: int) -> None:
        self._client, self._node, self._run_id = client, node, run_id
        self._root = tree.object_id
        self._missing = _object_ids(tree)
        self._contents: dict[str, bytes] = {}

    def fetch(self) -> bool:
        """Fetch the objects that are there; whether all are.

        Raises:
            RoundError: they are too large, too many, or will not come.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        if not 1 <= len(self._missing) + len(self._contents) <= _LARGEST_TREE:
            raise RoundError("a message of too many objects")
        for name in tuple(self._missing):
            answer = self._client.PullObject(PullObjectRequest(node=self._node, run_id=self._run_id, object_id=name))
            if not answer.object_found:
                raise RoundError("a message whose content is gone")
            if not answer.object_available:
                return False
            self._missing.remove(name)
            self._contents[name] = answer.object_content
            if sum(map(len, self._contents.values())) > LARGEST_MESSAGE:
                raise RoundError("a message of too many bytes")
        return True

    def message(self) -> Message:
        """The message, once it is whole; its objects are let go.

        Raises:
            RoundError: what came is no message.
        """
        from flwr.app import Message
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._node, run_id=self._run_id, message_object_id=self._root)
        )
        try:
            message = inflate_object_from_contents(self._root, self._contents)
        except Exception as error:  # whatever Flower's decoders make of what a stranger sent
            raise RoundError(f"a message that cannot be decoded: {type(error).__name__}") from None
        if not isinstance(message, Message):
            raise RoundError("objects that are no message")
        message.metadata.__dict__["_message_id"] = self._root
        return message


def _object_ids(tree: Any) -> list[str]:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    names: list[str] = []
    for node in iterate_object_tree(tree):
        names.append(node.object_id)
        if len(names) > _LARGEST_TREE:
            break
    return list(dict.fromkeys(names))
