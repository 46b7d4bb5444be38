"""The audit's part `exposure`: planted secrets in the audited run, and in one without noise beside it."""

from __future__ import annotations

import math
import time
from typing import Any

from fedpt_secure.attacks.exposure import CHANCE_BITS, MOST_BITS, by_repetition, exposure_of
from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.config import RunConfig
from fedpt_secure.data import Cache
from fedpt_secure.data.planting import Secret
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation import RunDirectory, load_planted, run_training
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.progress import Progress

FOLDER = "audit/without_dp"


def audit_exposure(subject: Subject, claim: Claim, budget: TimeBudget, progress: Progress, cache: Cache) -> Finding:
    """Exposure by repetition here and, where the budget has time to train it, in a run without noise."""
    secrets = subject.planted.secrets
    if not secrets:
        return Finding({"skipped": "no secrets were planted (train --secrets 3)"})
    began = time.monotonic()
    runs = [_run("audited", claim.epsilon if subject.statement["private"] else None, subject, secrets, progress)]
    scoring = time.monotonic() - began
    private = math.isfinite(subject.config.privacy.epsilon)
    if private and budget.fit(
        "a run without DP beside it",
        1,
        seconds_each=_training_seconds(subject) + scoring,
        share=0.6,
        consequence="there is nothing to compare the exposure with",
    ):
        runs.append(_without_dp(subject, progress, cache))
    result = {"most_bits": MOST_BITS, "chance_bits": CHANCE_BITS, "runs": runs}
    return Finding(result, (Check("exposure", False, False, 0.0, _sentence(runs)),))


def _run(
    name: str, epsilon: float | None, subject: Subject, secrets: tuple[Secret, ...], progress: Progress
) -> dict[str, Any]:
    found = []
    with progress.task(f"exposure ({name})", len(secrets), unit="secrets") as task:
        for secret in secrets:
            found.append(exposure_of(secret, subject.models.pair, subject.models.tokenizer))
            task.advance()
    return {"run": name, "epsilon": epsilon, "by_repetition": by_repetition(secrets, found)}


def _without_dp(subject: Subject, progress: Progress, cache: Cache) -> dict[str, Any]:
    """Train (or go on training) the same run without noise and with secrets of its own, and measure it."""
    config = _bare(subject.config)
    path = subject.directory.path / FOLDER
    directory = RunDirectory.open(path) if (path / "config.toml").exists() else RunDirectory.create(path, config)
    if not (path / "privacy.json").exists():
        directory.require_settings(config.model_dump())
        run_training(directory.config(), directory, cache=cache, progress=progress)
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        raise RunDirectoryError(f"{path} has lost its checkpoint", hint="remove it; the audit trains it again")
    small = subject.models.small
    before = small.adapter_vector()
    small.load_adapter_vector(released_adapter(checkpoint, directory.config()))
    try:
        return _run("without_dp", None, subject, load_planted(directory).secrets, progress)
    finally:
        small.load_adapter_vector(before)


def _bare(config: RunConfig) -> RunConfig:
    return config.model_copy(
        update={
            "privacy": config.privacy.model_copy(update={"epsilon": math.inf}),
            "audit": config.audit.model_copy(update={"canaries": 0, "record_server_view": False}),
            "federation": config.federation.model_copy(update={"ledgers": None}),
            "evaluation": config.evaluation.model_copy(update={"records": 10}),
        }
    )


def _training_seconds(subject: Subject) -> float:
    checkpoint = subject.directory.load_checkpoint()
    return sum(checkpoint.scalars["seconds"].values()) if checkpoint is not None else 0.0


def _sentence(runs: list[dict[str, Any]]) -> str:
    parts = []
    for run in runs:
        name = "with its noise" if run["run"] == "audited" and run["epsilon"] is not None else "without DP"
        tiers = ", ".join(
            f"{row['copies']}x {row['mean']:.1f} bits ({row['extracted']} of {row['secrets']} extracted)"
            for row in run["by_repetition"]
        )
        parts.append(f"{name}: {tiers}")
    return f"exposure of planted numbers (at most {MOST_BITS:.1f} bits, by chance {CHANCE_BITS:.2f}) {'; '.join(parts)}"
