"""A finished run, opened again for whoever judges it: its settings, text and models, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpt_secure.config import RunConfig
from fedpt_secure.data import Cache, FederatedText, load_federated_text
from fedpt_secure.data.planting import plant
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation.audit_record import load_planted
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.progress import Progress


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a report or an audit of a run works on.

    Attributes:
        config: as settled and trained with.
        text: the very text the run was trained and is judged on, planted records included; its digest was compared.
        models: with the run's final adapter loaded.
        privacy: the content of `privacy.json`.
    """

    config: RunConfig
    text: FederatedText
    models: RunModels
    privacy: Mapping[str, Any]


def open_finished(directory: RunDirectory, *, cache: Cache, progress: Progress) -> FinishedRun:
    """Load what a run directory describes; text comes from where the run had it, and must be the same.

    Raises:
        RunDirectoryError: rounds are missing, or the text or the small LM found now is another than the run's.
        FedptError: the text or the models cannot be loaded.
    """
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    done = 0 if checkpoint is None else checkpoint.rounds_done
    if checkpoint is None or done < config.federation.rounds or not (directory.path / "privacy.json").exists():
        raise RunDirectoryError(
            f"{directory.path} is not finished: {done} of {config.federation.rounds} rounds are done",
            hint=f"`fedpt-secure train --resume {directory.path}`; a look at held-out text before the end could choose "
            "when to stop, which would cost privacy",
        )
    privacy = directory.read_json(directory.path / "privacy.json")
    text = load_federated_text(config.data, seed=config.seed, cache=cache, progress=progress)
    text = plant(text, load_planted(directory))
    if text.digest != checkpoint.data_digest:
        raise RunDirectoryError(
            f"{directory.path} was trained on another text than {config.data.source!r} holds now",
            hint="restore the text as it was",
        )
    models = load_models(config, cache=cache, progress=progress)
    if models.small.digest != checkpoint.model_digest:
        raise RunDirectoryError(
            f"{directory.path} was trained with another small LM than {config.models.small!r} is now",
            hint="install the version that trained it, or restore the model's folder",
        )
    models.small.load_adapter_vector(released_adapter(checkpoint, config))
    return FinishedRun(config, text, models, privacy)
