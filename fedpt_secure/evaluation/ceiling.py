"""The ceiling: the large model tuned directly on everybody's text, trained once and kept.

**Not private.** It is trained centrally, without clipping or noise, and may repeat its training text. It serves as a
yardstick on the machine that holds the simulated clients' text anyway, is kept in a folder only its owner can enter,
and no epsilon speaks of it. A run's privacy statement is untouched, because nothing of the ceiling flows back.

**Which ceiling belongs to which run.** The folder's name is a digest of the large weights, the training records as
token ids and the settings: runs that differ in epsilon, mode or proxy share one, and none is used for other text.

    CACHE/ceilings/DIGEST/adapter/             PEFT's format
    CACHE/ceilings/DIGEST/ceiling.json         what it is; written last, so that what has it is complete
    CACHE/ceilings/DIGEST/progress.safetensors adapter, optimizer and step of an interrupted training
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpt_secure import files
from fedpt_secure.data.examples import Example
from fedpt_secure.data.fetch import Cache
from fedpt_secure.errors import DataError, ModelError
from fedpt_secure.evaluation.direct_lora import DirectSettings, DirectTuning, learning_rate, planned_batches
from fedpt_secure.lm.large_weights import LargeWeights
from fedpt_secure.progress import SILENT, Progress

SCHEMA = "fedpt-secure/ceiling/1"
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SHOWN_LOSS = 20
"""Steps whose mean loss stands behind the bar: of one batch it says little."""

_README = """# The large model tuned directly: NOT PRIVATE

A LoRA adapter trained centrally on the text of all simulated clients, without clipping and without noise, as a
yardstick for `fedpt-secure evaluate --ceiling`. It may repeat its training text. Do not give it to anybody.
"""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A directly tuned large model.

    Attributes:
        adapter: directory of the LoRA adapter, in PEFT's format.
        digest: of large weights, training records and settings.
        records: training records it learned from; `epochs`: how often.
        steps: AdamW steps.
        tokens: judged tokens learned from, repeats counted.
        trained_parameters: of the adapter.
        training_loss: mean over the last twentieth of the steps, nats per token.
        seconds: wall time of the training, restarts included.
        settings: as trained.
    """

    adapter: Path
    digest: str
    records: int
    epochs: int
    steps: int
    tokens: int
    trained_parameters: int
    training_loss: float
    seconds: float
    settings: dict[str, Any]


def tune_ceiling(
    weights: LargeWeights,
    examples: Sequence[Example],
    settings: DirectSettings,
    *,
    cache: Cache,
    device: torch.device,
    progress: Progress = SILENT,
) -> Ceiling:
    """The ceiling of these weights and training records: the one in the cache, or trained now.

    An interrupted training goes on from its last checkpoint (one a minute); two processes never train the same one.

    Args:
        weights: the large model.
        examples: the training records of all clients, in large ids. Never held-out ones.
        settings: of the training.
        cache: where ceilings are kept.
        device: where it trains.
        progress: a bar that counts judged tokens.

    Raises:
        DataError: there is no training record.
        ModelError: the model cannot be loaded or tuned, the training diverged, or what the cache holds is damaged.
    """
    if not examples:
        raise DataError("there is no training record to tune the large model on")
    if weights.endpoint is not None:
        raise ModelError(
            f"the large LM is behind an API ({weights.source}); there are no weights to tune",
            hint="evaluate without the ceiling, or with --large naming weights",
        )
    digest = ceiling_digest(weights, examples, settings)
    place = cache.root / "ceilings" / digest[:32]
    with cache.lock(f"ceiling-{digest[:32]}", progress):
        found = _load(place, digest)
        if found is None:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.chmod(0o700)
            _train(place, digest, weights, examples, settings, device, progress)
            found = _load(place, digest)
        if found is None:
            raise ModelError(f"the ceiling in {place} vanished while it was being written")
    return found


def ceiling_digest(weights: LargeWeights, examples: Sequence[Example], settings: DirectSettings) -> str:
    """SHA-256, in hex, of what a ceiling depends on."""
    digest = hashlib.sha256(b"fedpt-secure/ceiling/v1\n")
    digest.update(json.dumps([weights.digest, settings.model_dump()], sort_keys=True).encode() + b"\n")
    for example in examples:
        digest.update(json.dumps([example.loss_from, *example.ids]).encode() + b"\n")
    return digest.hexdigest()


def _train(
    place: Path,
    digest: str,
    weights: LargeWeights,
    examples: Sequence[Example],
    settings: DirectSettings,
    device: torch.device,
    progress: Progress,
) -> None:
    plan = planned_batches(examples, settings)
    tokens = np.array([sum(_judged(examples[index]) for index in batch) for batch in plan], dtype=np.int64)
    progress.note(
        f"tuning the large model directly, on all clients' training text, WITHOUT privacy: a yardstick, kept in {place}"
    )
    with progress.task("loading the large LM", None):
        tuning = DirectTuning(weights.path, settings, device)
    done, losses, seconds = _restore(place, digest, tuning)
    saved = began = time.monotonic()
    with progress.task("ceiling (not private)", int(tokens.sum()), unit="tokens") as task:
        task.advance(int(tokens[:done].sum()))
        for step in range(done, len(plan)):
            rate = learning_rate(step, len(plan), settings.learning_rate)
            losses.append(tuning.step([examples[index] for index in plan[step]], rate))
            task.describe(f"{np.mean(losses[-_SHOWN_LOSS:]):.3f} nats")
            task.advance(int(tokens[step]))
            if time.monotonic() - saved >= _SECONDS_BETWEEN_CHECKPOINTS:
                _save(place, digest, tuning, losses, seconds + time.monotonic() - began)
                saved = time.monotonic()
    seconds += time.monotonic() - began
    files.replace_directory(place / "adapter", lambda directory: _write_adapter(tuning, directory))
    tail = losses[-max(1, len(losses) // 20) :]
    content = {
        "schema": SCHEMA,
        "private": False,
        "digest": digest,
        "large": weights.source,
        "adapter_sha256": _adapter_digest(place),
        "records": len(set().union(*plan)),
        "epochs": settings.epochs,
        "steps": len(plan),
        "tokens": int(tokens.sum()),
        "trained_parameters": tuning.dimension,
        "training_loss": float(np.mean(tail)),
        "seconds": round(seconds, 3),
        "settings": settings.model_dump(),
    }
    files.write_json(place / "ceiling.json", content, mode=0o600)
    (place / "progress.safetensors").unlink(missing_ok=True)


def _write_adapter(tuning: DirectTuning, directory: Path) -> None:
    tuning.model.save_pretrained(str(directory), save_embedding_layers=False)
    files.write_text(directory / "README.md", _README)


def _save(place: Path, digest: str, tuning: DirectTuning, losses: list[float], seconds: float) -> None:
    metadata = {"digest": digest, "losses": json.dumps(losses), "seconds": str(seconds)}
    files.write_bytes(place / "progress.safetensors", save(tuning.state(), metadata=metadata), mode=0o600)


def _restore(place: Path, digest: str, tuning: DirectTuning) -> tuple[int, list[float], float]:
    """Steps done, their losses and the seconds they took; the model is as it was then."""
    path = place / "progress.safetensors"
    files.sweep(path)
    if not path.exists():
        return 0, [], 0.0
    try:
        with safe_open(path, framework="pt") as content:
            metadata = content.metadata() or {}
            if metadata["digest"] != digest:
                raise ValueError("it belongs to another training")
            losses = [float(loss) for loss in json.loads(metadata["losses"])]
            tuning.restore({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
            return len(losses), losses, float(metadata["seconds"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the interrupted training {path} is damaged: {error}", hint="delete it to begin again"
        ) from None


def _load(place: Path, digest: str) -> Ceiling | None:
    """The finished ceiling of a folder, or None.

    Raises:
        ModelError: it is finished, and damaged.
    """
    path = place / "ceiling.json"
    if not path.exists():
        return None
    names = [name for name in Ceiling.__dataclass_fields__ if name != "adapter"]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA or content["digest"] != digest:
            raise ValueError("it belongs to something else")
        if content["adapter_sha256"] != _adapter_digest(place):
            raise ValueError("the adapter is not the one that was written")
        return Ceiling(adapter=place / "adapter", **{name: content[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the ceiling in {place} is damaged: {error}", hint="delete the folder to train it again"
        ) from None


def _adapter_digest(place: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((place / "adapter").iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _judged(example: Example) -> int:
    return len(example.ids) - example.loss_from


def ceiling_document(ceiling: Ceiling) -> dict[str, Any]:
    """What a report says of it; the place is left out, for it names a folder of this machine."""
    content = asdict(ceiling)
    del content["adapter"]
    return {"private": False, **content}
