"""Files that cross a trust boundary: identities, rosters, settings, and what a run directory holds."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from fedpt_secure.config import RunConfig, build, read_settings
from fedpt_secure.crypto import InsecureDeterministicBytes, PublicIdentity, Roster, StoredIdentity
from fuzz.golden import rounds
from fuzz.target import Finding, Target


@cache
def _scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="fedpt-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _identity() -> StoredIdentity:
    return StoredIdentity.make("clinic-a", passphrase=None, random_bytes=InsecureDeterministicBytes(b"fuzzed identity"))


def _public_identity(data: bytes) -> bytes:
    return PublicIdentity.from_json(data).to_json()


def _public_identity_seeds() -> Sequence[bytes]:
    return [_identity().public.to_json()]


def _secret_identity(data: bytes) -> bytes:
    stored = StoredIdentity.from_json(data)
    if not stored.is_sealed:
        stored.open(lambda: "")
    return stored.to_json()


def _secret_identity_seeds() -> Sequence[bytes]:
    bare = _identity()
    # Nothing is sealed in it: Argon2id would take longer than the whole replay, and the target does not open it.
    sealed = {
        "format": "fedpt-secure sealed identity v1",
        "id": bare.public.client_id,
        "verify_key": bare.public.verify_key.hex(),
        "salt": "5a" * 16,
        "sealed_seed": "c3" * 48,
    }
    return [bare.to_json(), json.dumps(sealed, indent=2).encode() + b"\n"]


def _roster(data: bytes) -> bytes:
    return Roster.from_json(data).to_json()


def _roster_seeds() -> Sequence[bytes]:
    return [golden.roster.to_json() for golden in rounds()]


def _settings(data: bytes) -> bytes:
    path = _scratch() / "settings.toml"
    path.write_bytes(data)
    config = build(RunConfig, read_settings(path))
    if build(RunConfig, tomllib.loads(config.to_toml())) != config:
        raise Finding("accepted settings are others after they were written and read again")
    return data


def _settings_seeds() -> Sequence[bytes]:
    return [
        RunConfig().to_toml().encode(),
        b'seed = 3\n[federation]\nrounds = 5\ncohort = 8\n[privacy]\nepsilon = inf\n[data]\nsource = "sotu"\n',
    ]


def _checkpoint(data: bytes) -> bytes:
    from fedpt_secure.federation import RunDirectory

    path = _scratch() / "checkpoint" / "state.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    RunDirectory(_scratch()).load_checkpoint()
    return data


def _checkpoint_seeds() -> Sequence[bytes]:
    import numpy as np

    from fedpt_secure.federation import RunDirectory
    from fedpt_secure.federation.run_directory import Checkpoint

    (_scratch() / "checkpoint").mkdir(exist_ok=True)
    directory = RunDirectory(_scratch())
    names = ("adapter", "first_moment", "second_moment", "seen", "average")
    directory.save_checkpoint(
        Checkpoint(
            run_id=bytes(16),
            rounds_done=2,
            config_toml="seed = 0\n",
            data_digest="d" * 64,
            model_digest="m" * 64,
            tensors={name: np.zeros(3, np.float32) for name in names},
            scalars={"optimizer_steps": 2, "seconds": {"rounds": 1.5}, "clip_norm": 0.1},
        )
    )
    return [(_scratch() / "checkpoint" / "state.safetensors").read_bytes()]


def _run_log(data: bytes) -> bytes:
    from fedpt_secure.federation import RunDirectory

    (_scratch() / "metrics.jsonl").write_bytes(data)
    RunDirectory(_scratch()).read_log("metrics")
    return data


def _run_log_seeds() -> Sequence[bytes]:
    return [b'{"round": 0, "aborted": false}\n{"round": 1, "adapter_norm": 0.5}\n', b""]


TARGETS: Final[dict[str, Target]] = {
    "public-identity": Target("PublicIdentity.from_json", _public_identity, _public_identity_seeds),
    "secret-identity": Target(
        "StoredIdentity.from_json, opened if not sealed", _secret_identity, _secret_identity_seeds
    ),
    "roster": Target("Roster.from_json", _roster, _roster_seeds),
    "settings": Target("config.read_settings and build(RunConfig)", _settings, _settings_seeds),
    "checkpoint": Target("RunDirectory.load_checkpoint", _checkpoint, _checkpoint_seeds),
    "run-log": Target("RunDirectory.read_log", _run_log, _run_log_seeds),
}
