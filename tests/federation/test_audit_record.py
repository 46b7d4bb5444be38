"""What a run keeps for its auditor is the auditor's alone, and is kept only where somebody asked for it."""

from __future__ import annotations

import stat

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation.audit_record import AuditRecorder

ADAPTER = np.zeros(3, np.float32)


def recorded(path, audit, mode="local"):
    """The run's files under `audit/` after one round with one client's release and one masked vector."""
    config = build(RunConfig, {"audit": audit, "privacy": {"mode": mode}})
    directory = RunDirectory.create(path, config)
    recorder = AuditRecorder(directory, config)
    recorder.begin(ADAPTER)
    recorder.release("ann", ADAPTER + 1)
    recorder.message(0, "mask", "ann", b"masked")
    recorder.message(0, "shares", "ann", b"keys")
    recorder.end(0, np.ones(3))
    return sorted(entry for entry in (path / "audit").rglob("*") if entry.is_file())


@pytest.mark.parametrize("audit", [{"canaries": 2}, {"record_server_view": True}])
def test_nobody_else_can_read_it(tmp_path, audit):
    files = recorded(tmp_path / "run", audit)
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "run" / "audit").stat().st_mode) == 0o700


@pytest.mark.parametrize("audit", [{}, {"secrets": 1}])
def test_a_run_that_was_asked_for_neither_keeps_nothing(tmp_path, audit):
    assert recorded(tmp_path / "run", audit) == []


def test_bare_updates_are_kept_in_mode_local_only(tmp_path):
    (local,) = recorded(tmp_path / "local", {"canaries": 2})
    (summed,) = recorded(tmp_path / "distributed", {"canaries": 2}, mode="distributed")
    assert b"client/ann" in local.read_bytes()
    assert b"client/ann" not in summed.read_bytes()
    assert b"sum" in summed.read_bytes()
