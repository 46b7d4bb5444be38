"""The ClientApp: forwards requests to the worker, byte for byte, and knows nothing that it could tell.

It runs in the bridge. Which worker it asks is the bridge's choice; nothing in a message, a context or an app bundle
has a say in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedpt_secure.errors import FedptError
from fedpt_secure.flower.messages import MESSAGE_TYPES, REPLY, REQUEST, pack, unpack
from fedpt_secure.network.transport import Reply, Request

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

Ask = Callable[[bytes, float], bytes]
"""A worker: (request, seconds) -> reply."""


def make_client_app(ask: Ask) -> ClientApp:
    """The app over a worker. What it is asked wrongly it answers with `silent`, and asks nobody."""
    from flwr.clientapp import ClientApp

    app = ClientApp()
    for phase, message_type in MESSAGE_TYPES.items():
        category, action = message_type.split(".")
        register = app.train if category == "train" else app.query
        register(action)(_handler(phase, ask))
    return app


def silent_reply(message: Message, code: str) -> Message:
    """A reply that says with one word that there is none."""
    from flwr.app import Message

    return Message(pack(REPLY, Reply("silent", code=code).to_bytes()), reply_to=message)


def _handler(phase: str, ask: Ask) -> Callable[[Message, Context], Message]:
    from flwr.app import Message

    def answer(message: Message, context: Context) -> Message:
        try:
            request = unpack(message.content if message.has_content() else None, REQUEST)
            if Request.from_bytes(request).phase != phase:
                return silent_reply(message, "request")
        except FedptError:
            return silent_reply(message, "request")
        try:
            reply = ask(request, message.metadata.ttl)
            Reply.from_bytes(reply)
        except FedptError:
            return silent_reply(message, "worker")
        return Message(pack(REPLY, reply), reply_to=message)

    return answer
