"""What tests of Flower's side share."""

from __future__ import annotations

import pytest


@pytest.fixture
def task_identity(monkeypatch):
    """Flower's messages ask the process which task it runs."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
