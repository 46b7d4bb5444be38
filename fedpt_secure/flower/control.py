"""What the server's machine asks its own SuperLink: to register SuperNodes, to start a run, how it fares."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_secure import files
from fedpt_secure.errors import RoundError
from fedpt_secure.flower.runtime import Runtime

_PROJECT = """\
# An empty shell, for Flower wants a bundle for every run. The apps that run are those that are installed.
[project]
name = "fedpt-federation"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedpt-secure"

[tool.flwr.app.components]
serverapp = "fedpt_federation:server"
clientapp = "fedpt_federation:client"
"""
_MODULE = 'raise RuntimeError("this bundle is a shell and never runs")\n'


@dataclass(frozen=True, slots=True)
class RunState:
    """A Flower run: whether its task was ever taken, whether it is over, and if so whether well."""

    run_id: int
    pending: bool
    finished: bool
    completed: bool
    details: str


class Control:
    """The control API of the SuperLink on this machine (`connected`).

    Every method raises RoundError where the SuperLink cannot be reached, or refuses.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def register(self, keys: Iterable[bytes]) -> int:
        """Let the SuperNodes with these public keys in; how many of them were not known yet."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest

        with _told():
            known = {bytes(node.public_key) for node in self._client.ListNodes(ListNodesRequest()).nodes_info}
            new = [key for key in dict.fromkeys(keys) if key not in known]
            for key in new:
                self._client.RegisterNode(RegisterNodeRequest(public_key=key))
        return len(new)

    def start(self, bundle: bytes) -> int:
        """Start a run; its id."""
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        with _told():
            answer = self._client.StartRun(
                StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})))
            )
        if not answer.HasField("run_id"):
            raise RoundError("the SuperLink did not start the run")
        return int(answer.run_id)

    def stop(self, run_id: int) -> None:
        """End a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        with _told():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def run(self, run_id: int) -> RunState:
        """How a run fares."""
        return next(state for state in self._runs(run_id) if state.run_id == run_id)

    def unfinished(self) -> list[RunState]:
        """The latest runs that are not over, newest first."""
        return [state for state in self._runs() if not state.finished]

    def _runs(self, run_id: int | None = None) -> list[RunState]:
        from flwr.common.constant import Status, SubStatus
        from flwr.proto.control_pb2 import ListRunsRequest

        with _told():
            answer = self._client.ListRuns(ListRunsRequest() if run_id is None else ListRunsRequest(run_id=run_id))
        newest_first = sorted(answer.run_dict.values(), key=lambda run: str(run.pending_at), reverse=True)
        return [
            RunState(
                int(run.run_id),
                run.status.status == Status.PENDING,
                run.status.status == Status.FINISHED,
                run.status.sub_status == SubStatus.COMPLETED,
                run.status.details,
            )
            for run in newest_first
        ]


@contextmanager
def connected(runtime: Runtime) -> Iterator[Control]:
    """The control API at the SuperLink's address."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        server_address=runtime.address,
        insecure=runtime.authority is None,
        root_certificates=runtime.certificates(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client)
    finally:
        client.close()


def shell_bundle(directory: Path) -> bytes:
    """The bundle of a run, which is empty: what runs is what is installed.

    Args:
        directory: where its source is written.
    """
    from flwr.cli.build import build_fab_from_disk

    files.write_text(directory / "pyproject.toml", _PROJECT)
    files.write_text(directory / "fedpt_federation" / "__init__.py", _MODULE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Flower's own use of pathspec
        bundle: bytes = build_fab_from_disk(directory)
    return bundle


@contextmanager
def _told() -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        raise RoundError(f"the SuperLink refused: {error.response.text[:300]}") from None
    except httpx.HTTPError as error:
        raise RoundError(
            f"the SuperLink cannot be reached: {error}", hint="is `fedpt-secure federation server` running?"
        ) from None
