"""The ServerApp: the coordinator over the grid of a Flower run."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fedpt_secure.flower.grid_transport import GridTransport
from fedpt_secure.flower.mailbox import FlowerMailbox
from fedpt_secure.network.folder import ServerFolder
from fedpt_secure.progress import Progress

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.superlink.grid import HttpGrid


def make_server_app(folder: ServerFolder, progress: Progress) -> ServerApp:
    """The app that runs this folder's federation. Nothing of its context or of its run's bundle is looked at."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        from fedpt_secure.network.coordinator import run_federation

        run_federation(folder, GridTransport(FlowerMailbox(cast("HttpGrid", grid))), progress=progress)

    app.main()(main)
    return app
