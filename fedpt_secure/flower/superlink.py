"""The server's SuperLink, closed to strangers but for SuperNodes.

Stock SuperLink offers everything on one port: to SuperNodes, which sign, and also, to anybody, the control API, where
runs are started and stopped and SuperNodes registered. Here whatever is not for SuperNodes is for this machine only.
"""

from __future__ import annotations

import sys
from typing import Any

from fedpt_secure.network.folder import is_loopback

_OPEN = "/v1/fleet/"
"""What SuperNodes use; Flower checks their signatures."""
_REFUSED = b"only for SuperNodes"


class LocalOnly:
    """ASGI middleware: other peers than this machine reach nothing but `/v1/fleet/`.

    Behind a proxy on this machine all peers are this machine: such a proxy must pass on `/v1/fleet/` only.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on or refuse one connection."""
        if scope["type"] in ("http", "websocket") and not is_allowed(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_REFUSED)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})
            return
        await self._app(scope, receive, send)


def is_allowed(scope: Any) -> bool:
    """Whether a request is for SuperNodes or comes from this machine."""
    path, client = scope.get("path", ""), scope.get("client")
    return path.startswith(_OPEN) or (client is not None and is_loopback(client[0]))


def main() -> None:
    """`python -m fedpt_secure.flower.superlink`, with the arguments of `flower-superlink`."""
    import uvicorn
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    from fedpt_secure.flower.compatibility import require_compatible

    require_compatible()
    run = uvicorn.run
    # Every SuperNode asks twice a second: a line each would fill a disk within weeks.
    uvicorn.run = lambda *arguments, **settings: run(*arguments, **settings | {"access_log": False})
    extensions.get_middleware = lambda: (Middleware(LocalOnly),)
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
