"""The audit's part `shadows`: `--shadows N` models beside the audited one, kept, and RMIA with them."""

from __future__ import annotations

import hashlib
import json
import time

import numpy as np

from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.membership import ADAPTER_VIEW, adapter_scores, headline, view_result
from fedpt_secure.attacks.settings import AuditSettings, TimeBudget
from fedpt_secure.attacks.shadows import rmia_scores, store_shadow, stored_shadow, train_shadow
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.errors import DataError
from fedpt_secure.progress import SILENT, Progress

MOST_RECORDS, FEWEST = 400, 8
FEWEST_SHADOWS = 2


def audit_shadows(
    subject: Subject,
    claim: Claim,
    settings: AuditSettings,
    budget: TimeBudget,
    progress: Progress,
    rng: np.random.Generator,
) -> Finding:
    """Train what is missing of the shadows, and score members and others with them.

    Raises:
        DataError: fewer than `FEWEST` records of either kind.
    """
    if settings.shadows == 0:
        return Finding({"skipped": "no shadow models were asked for (audit --shadows 8)"})
    members, others = subject.members(), subject.non_members()
    count = min(MOST_RECORDS, len(members), len(others))
    if count < FEWEST:
        raise DataError(f"{count} records of each kind are too few for shadow models; {FEWEST} are needed")
    chosen = [side[index] for side in (members, others) for index in rng.permutation(len(side))[:count]]
    candidates = subject.candidates(chosen)
    examples = [subject.small_example(record) for record in chosen]
    small, view = subject.models.small, subject.adapter_view()
    audited = adapter_scores(view, candidates, progress)["loss"]
    place = subject.directory.path / "audit" / "shadows" / _key(subject, [record.key for record in chosen])
    shadows, wanted, each = [], settings.shadows, 0.0
    with progress.task("shadow models", wanted, unit="models") as task:
        for number in range(settings.shadows):
            if number >= wanted:
                break
            began = time.monotonic()
            path = place / f"{number:04d}.safetensors"
            seen = np.random.default_rng([settings.seed, 77, number]).random(2 * count) < 0.5
            found = stored_shadow(path)
            if found is None:
                train = [example for example, included in zip(examples, seen, strict=True) if included]
                noise = subject.statement["noise_multiplier"] if subject.statement["private"] else 0.0
                adapter = train_shadow(subject.config, small, train, noise_multiplier=noise, rng=rng)
                store_shadow(path, adapter, seen)
            else:
                adapter = found[0]
            before = small.adapter_vector()
            small.load_adapter_vector(adapter)
            try:
                shadows.append(adapter_scores(view, candidates, SILENT)["loss"])
            finally:
                small.load_adapter_vector(before)
            task.advance()
            each = max(each, time.monotonic() - began)
            if number == 0:
                wanted = budget.fit(
                    "shadow models",
                    settings.shadows,
                    seconds_each=each,
                    share=0.5,
                    minimum=FEWEST_SHADOWS,
                    consequence="the reference of each record is less exact",
                )
    scores = {"rmia": rmia_scores(audited, np.array(shadows))}
    result = view_result(
        ADAPTER_VIEW, None, scores, np.arange(2 * count) < count, epsilon=claim.epsilon, delta=claim.delta, rng=rng
    )
    result["headline"] = "rmia"
    area = headline(result)["auc"]
    sentence = f"RMIA with {len(shadows)} shadows: AUC {area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"
    return Finding(
        {"shadows": len(shadows), "records": 2 * count, "views": [result]},
        (Check("shadow models", False, False, 0.0, sentence),),
    )


def _key(subject: Subject, keys: list[tuple[str, str]]) -> str:
    """Shadows belong to the records they were asked about and to the run's settings, not to its adapter."""
    content = json.dumps([subject.config.model_dump(mode="json"), keys], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:24]
