"""What a run keeps for a later audit, in its `audit/` folder: what was planted, and what the promise's adversary saw.

    planted.json               canaries with their coins, and secrets. Only the auditor may have it.
    releases/round_NNNNN.safetensors
                               the adapter a round began with, and what the promise's strongest adversary sees of the
                               round: in mode `local` every client's noised update, bare; else the noised sum
    server_view/round_NNNNN/   masked vectors that the server received, byte for byte (`audit.record_server_view`)

None of it belongs to a release: whoever holds the coins can measure what the adapter tells about them. Only the owner
of the run can enter the folder (mode 0700) or read its files (0600).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedpt_secure import files
from fedpt_secure.config import RunConfig
from fedpt_secure.data import FederatedText
from fedpt_secure.data.planting import Canary, Planted, Secret, make_canaries, make_secrets, plant
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation.run_directory import PLANTED, RunDirectory
from fedpt_secure.lm.base import builtin_directory

SCHEMA = "fedpt-secure/planted/1"
SUM = "sum"
"""Name of a round's noised sum among its releases."""
_FOLDER = "audit"
_OWNER_ONLY = 0o600


def planted_text(
    config: RunConfig, text: FederatedText, schedule: tuple[tuple[str, ...], ...], directory: RunDirectory
) -> FederatedText:
    """The text that a run trains on: as it is, or with planted records; coins are drawn before the first round only.

    Raises:
        RunDirectoryError: the run has begun, and what was planted into it is gone or damaged.
        DataError: a planted record is one of the text's own.
        ConfigError: secrets are wanted and the package that invents people is missing.
    """
    if not config.audit.plants:
        return text
    if directory.load_checkpoint() is not None:
        return plant(text, load_planted(directory))
    owners = sorted(set().union(*schedule))
    if config.insecure_deterministic:
        rng = simulation_rng("planting", config.seed)
        below = lambda bound: int(rng.integers(bound))  # noqa: E731
    else:
        below = secrets.randbelow
    planted = Planted(
        make_canaries(config.audit.canaries, owners, _public_words(), below=below) if config.audit.canaries else (),
        make_secrets(config.audit.secrets, owners, below=below, seed=config.seed) if config.audit.secrets else (),
    )
    changed = plant(text, planted)
    _write(directory, planted)
    return changed


def load_planted(directory: RunDirectory) -> Planted:
    """What was planted into a run; nothing, where it plants nothing.

    Raises:
        RunDirectoryError: it is gone or damaged.
    """
    if not directory.config().audit.plants:
        return Planted()
    path = directory.path / PLANTED
    content = directory.read_json(path)
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        planted = Planted(
            tuple(_item(Canary, item) for item in content["canaries"]),
            tuple(_item(Secret, item) for item in content["secrets"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error!r}", hint="restore it, or start a new run") from None
    return planted


def _item(kind: Any, item: Mapping[str, Any]) -> Any:
    made = kind(**item)
    wanted = {"client_id": str, "text": str, "included": bool, "prefix": str, "number": str, "copies": int}
    for name, value in item.items():
        if type(value) is not wanted[name]:
            raise ValueError(f"{name} is {value!r}")
    return made


def _write(directory: RunDirectory, planted: Planted) -> None:
    content = {
        "schema": SCHEMA,
        "canaries": [
            {"client_id": item.client_id, "text": item.text, "included": item.included} for item in planted.canaries
        ],
        "secrets": [
            {"client_id": item.client_id, "prefix": item.prefix, "number": item.number, "copies": item.copies}
            for item in planted.secrets
        ],
    }
    path = directory.path / PLANTED
    _close_to_others(path.parent)
    files.write_json(path, content, mode=_OWNER_ONLY)


def _close_to_others(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _public_words() -> tuple[str, ...]:
    """Words of the built-in public text, in lower case."""
    text = (builtin_directory() / "public_text.txt").read_text(encoding="utf-8").lower()
    return tuple(sorted({word for word in text.split() if word.isascii() and word.isalpha() and len(word) > 2}))


class AuditRecorder:
    """Writes down what the adversary of a run's privacy statement sees, where the run has canaries to audit.

    A resumed round overwrites what its interrupted attempt left: a round's file holds one attempt.
    """

    def __init__(self, directory: RunDirectory, config: RunConfig) -> None:
        self._root = directory.path / _FOLDER
        self._releases = config.audit.canaries > 0
        self._bare = config.privacy.mode == "local"
        self._messages = config.audit.record_server_view
        self._seen: dict[str, npt.NDArray[np.float32]] = {}
        if self._releases or self._messages:
            _close_to_others(self._root)

    def begin(self, adapter: npt.NDArray[np.float32]) -> None:
        """A round begins at this adapter."""
        self._seen = {"adapter": adapter.copy()}

    def release(self, client_id: str, released: npt.NDArray[Any]) -> None:
        """What a client releases. Kept in mode `local` only, where it is noised enough to be shown to anybody."""
        if self._releases and self._bare:
            self._seen[f"client/{client_id}"] = released.astype(np.float32)

    def message(self, round_index: int, phase: str, client_id: str, content: bytes) -> None:
        """What the server receives. Masked vectors are what an audit reads; keys and shares are kept by nobody."""
        if self._messages and phase == "mask":
            place = self._root / "server_view" / f"round_{round_index:05d}"
            files.write_bytes(
                place / f"{hashlib.sha256(client_id.encode()).hexdigest()}.mask", content, mode=_OWNER_ONLY
            )

    def end(self, round_index: int, mean_update: npt.NDArray[np.float64] | None) -> None:
        """The round is over; None where it was aborted, and nothing is kept."""
        if self._releases and mean_update is not None:
            if not self._bare:
                self._seen[SUM] = mean_update.astype(np.float32)
            path = releases_path(self._root.parent, round_index)
            content = save({name: np.ascontiguousarray(value) for name, value in self._seen.items()})
            files.write_bytes(path, content, mode=_OWNER_ONLY)
        self._seen = {}


def releases_path(run: Path, round_index: int) -> Path:
    """Where a round's releases lie."""
    return run / _FOLDER / "releases" / f"round_{round_index:05d}.safetensors"


def load_releases(directory: RunDirectory, round_index: int) -> dict[str, npt.NDArray[np.float32]]:
    """`adapter`, and `sum` or one `client/ID` for each release of a round; empty where nothing was kept.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    path = releases_path(directory.path, round_index)
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as content:
            found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}", hint="train again to audit the releases") from None
    if "adapter" not in found or any(value.ndim != 1 or value.dtype != np.float32 for value in found.values()):
        raise RunDirectoryError(f"{path} is damaged: it does not hold an adapter and vectors")
    return found


def load_server_view(directory: RunDirectory, round_index: int) -> dict[str, bytes]:
    """Masked vectors as the server received them, by SHA-256 of the client's id; empty where nothing was kept."""
    place = directory.path / _FOLDER / "server_view" / f"round_{round_index:05d}"
    if not place.is_dir():
        return {}
    return {path.stem: path.read_bytes() for path in sorted(place.glob("*.mask"))}
