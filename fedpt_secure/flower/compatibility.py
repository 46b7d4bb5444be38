"""Which Flower this was tested with, and whether the installed one has everything that is used of it.

Flower's public API has no place for an app that is not sent over the network, so some of what is used here is
internal to it: `REQUIRED` is all of it, and the extra `flower` pins the releases it was tested with.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module, metadata, util

from fedpt_secure.errors import ConfigError

TESTED = "1.42"
INSTALL = 'pip install "fedpt-secure[flower]"'
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "flwr.app": ("ConfigRecord", "Message", "RecordDict"),
    "flwr.clientapp": ("ClientApp",),
    "flwr.serverapp": ("ServerApp",),
    "flwr.cli.build": ("build_fab_from_disk",),
    "flwr.common.constant": ("Status", "SubStatus", "SUPERLINK_NODE_ID"),
    "flwr.common.serde": ("context_from_proto", "fab_to_proto", "run_from_proto"),
    "flwr.proto.control_pb2": (
        "ListNodesRequest",
        "ListRunsRequest",
        "RegisterNodeRequest",
        "StartRunRequest",
        "StopRunRequest",
    ),
    "flwr.proto.message_pb2": ("ConfirmMessageReceivedRequest", "PullObjectRequest"),
    "flwr.proto.node_pb2": ("Node",),
    "flwr.proto.runtime_pb2": (
        "AcquireTaskRequest",
        "GetNodesRequest",
        "PullAppMessagesRequest",
        "PullTaskInputRequest",
        "PushTaskOutputRequest",
        "SendTaskHeartbeatRequest",
    ),
    "flwr.supercore.constant": ("TaskType",),
    "flwr.supercore.control": ("ControlHttpClient",),
    "flwr.supercore.fab": ("Fab",),
    "flwr.supercore.inflatable.inflatable_object": ("iterate_object_tree",),
    "flwr.supercore.inflatable.inflatable_utils": ("inflate_object_from_contents",),
    "flwr.supercore.interceptors": (
        "RuntimeTokenHttpInterceptor",
        "RuntimeVersionHttpInterceptor",
        "SuperExecAuthHttpInterceptor",
    ),
    "flwr.supercore.runtime": ("RuntimeHttpClient",),
    "flwr.supercore.task_identity": ("TaskIdentity",),
    "flwr.superlink.cli.flower_superlink": ("flower_superlink",),
    "flwr.superlink.extensions": ("get_middleware",),
    "flwr.superlink.grid": ("HttpGrid",),
    "flwr.supernode.cli.flower_supernode": ("flower_supernode",),
    "flwr.supernode.runtime.run_clientapp": ("push_message", "push_task_output"),
    "flwr.supernode.start_client_internal": ("time",),
}
"""Module -> the names that are used of it."""


def require_installed() -> None:
    """Look for Flower without importing it, which takes a second.

    Raises:
        ConfigError: it is not installed.
    """
    if util.find_spec("flwr") is None:
        raise ConfigError("a federation of machines needs Flower, which is not installed", hint=INSTALL)


def require_compatible() -> None:
    """Import all that is used of Flower.

    Raises:
        ConfigError: something is missing; the message names the release.
    """
    require_installed()
    missing = missing_names(REQUIRED)
    superlink = "flwr.superlink.main"
    if not missing and "extensions.get_middleware()" not in inspect.getsource(import_module(superlink)):
        missing = [f"{superlink} (a place for middleware)"]
    if missing:
        raise ConfigError(
            f"Flower {metadata.version('flwr')} lacks what is used of {TESTED}: {', '.join(missing)}", hint=INSTALL
        )


def missing_names(required: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Those of `required` that are not there."""
    missing = []
    for module, names in required.items():
        try:
            loaded = import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(loaded, name)]
    return missing


if __name__ == "__main__":
    try:
        require_compatible()
    except ConfigError as error:
        sys.exit(error.message)
