"""The Hugging Face hub, asked without surprises: never a long wait, never a file outside our own cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedpt_secure.errors import FedptError

CONNECT_SECONDS = 3.0
"""Longest time spent on finding out whether the hub answers, name look-up included."""


class RepositoryMissing(FedptError):
    """The hub answered, and has no such repository or revision for this user."""


def hub_commit(kind: Literal["model", "dataset"], repository: str, *, revision: str | None = None) -> str | None:
    """The commit of a repository on the hub, or None if the hub does not answer within `CONNECT_SECONDS`.

    None also where the environment says `HF_HUB_OFFLINE=1`. The answer is a git commit id: what is fetched by it
    cannot change later.

    Raises:
        RepositoryMissing: the hub answered, but not with that repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    found: list[str] = []
    missing: list[Exception] = []

    def ask() -> None:
        try:
            look_up = HfApi().model_info if kind == "model" else HfApi().dataset_info
            commit = look_up(repository, revision=revision, timeout=CONNECT_SECONDS).sha
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            missing.append(error)
        except Exception:  # whatever went wrong on the way there: the hub cannot be used
            return
        else:
            found.extend([commit] if commit else [])

    # The library's own time limit does not cover the name look-up, which can block for long behind some firewalls.
    thread = threading.Thread(target=ask, daemon=True, name="hub-look-up")
    thread.start()
    thread.join(CONNECT_SECONDS)
    if missing:
        raise RepositoryMissing(
            f"the Hugging Face hub has no {kind} {repository!r} that you may read",
            hint="check the spelling; a private one needs HF_TOKEN",
        ) from missing[0]
    return found[0] if found else None


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Inside the block the hub's libraries keep their files under `folder`, show no bars, and report no usage."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # The library reads these at each call, so it does not matter when it was imported.
    mine = {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_XET_CACHE": str(folder / "xet"),
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    before = {name: getattr(constants, name) for name in mine}
    bars_shown = not are_progress_bars_disabled()
    for name, value in mine.items():
        setattr(constants, name, value)
    disable_progress_bars()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        if bars_shown:
            enable_progress_bars()
