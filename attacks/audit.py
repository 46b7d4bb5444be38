"""The audit of a finished run: parts in their order, checks from all of them, one verdict. The reader's entry.

Each part takes what its adversary may see and yields a `Finding`; parts are kept as they end, so that an audit that was
interrupted goes on.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from fedpt_secure import __version__, files
from fedpt_secure.attacks.accounting import audit_accounting
from fedpt_secure.attacks.canaries_part import audit_canaries
from fedpt_secure.attacks.exposure_part import audit_exposure
from fedpt_secure.attacks.findings import Check, Finding, verdict
from fedpt_secure.attacks.mechanism_part import audit_mechanism
from fedpt_secure.attacks.membership_part import audit_membership
from fedpt_secure.attacks.protocol import audit_protocol
from fedpt_secure.attacks.server_view_part import audit_server_view
from fedpt_secure.attacks.settings import PARTS, AuditSettings, Part, TimeBudget
from fedpt_secure.attacks.shadows_part import audit_shadows
from fedpt_secure.attacks.store import PartStore
from fedpt_secure.attacks.subject import Claim, Subject, claim_of, load_subject
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory
from fedpt_secure.progress import Progress

SCHEMA = "fedpt-secure/audit/1"
FILE = "audit/audit.json"
_POWER_TO_SPARE = 50
"""What divides alpha for checks that would find a broken build at a millionth of it: the verdict stays near alpha."""
_PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "dp-accounting")


@dataclass(frozen=True, slots=True)
class Audit:
    """What every part is given.

    Attributes:
        budget: chooses sizes.
        cache: of models and data, for parts that train.
    """

    subject: Subject
    claim: Claim
    settings: AuditSettings
    budget: TimeBudget
    progress: Progress
    cache: Cache

    def rng(self, purpose: int) -> np.random.Generator:
        """For choosing records and halves; seeded, so that an audit can be repeated."""
        return np.random.default_rng([self.settings.seed, purpose])


_RUNNERS: dict[Part, Callable[[Audit], Finding]] = {
    "accounting": lambda audit: audit_accounting(audit.subject, audit.claim),
    "membership": lambda audit: audit_membership(
        audit.subject, audit.claim, audit.budget, audit.progress, audit.rng(1)
    ),
    "canaries": lambda audit: audit_canaries(
        audit.subject, audit.claim, audit.budget, audit.progress, audit.rng(2), alpha=audit.settings.alpha
    ),
    "mechanism": lambda audit: audit_mechanism(
        audit.subject, audit.claim, audit.budget, audit.progress, alpha=audit.settings.alpha / _POWER_TO_SPARE
    ),
    "protocol": lambda audit: audit_protocol(audit.progress),
    "server_view": lambda audit: audit_server_view(
        audit.subject, audit.budget, audit.progress, audit.rng(3), alpha=audit.settings.alpha / _POWER_TO_SPARE
    ),
    "exposure": lambda audit: audit_exposure(audit.subject, audit.claim, audit.budget, audit.progress, audit.cache),
    "shadows": lambda audit: audit_shadows(
        audit.subject, audit.claim, audit.settings, audit.budget, audit.progress, audit.rng(4)
    ),
}


def run_audit(directory: RunDirectory, settings: AuditSettings, *, cache: Cache, progress: Progress) -> dict[str, Any]:
    """Audit a run; returns and writes the result (schema `SCHEMA`; docs/audits.md).

    Raises:
        RunDirectoryError: the run is not finished, damaged, or in use.
        FedptError: its data or models cannot be had.
    """
    with directory.locked():
        return _run(directory, settings, cache, progress)


def _run(directory: RunDirectory, settings: AuditSettings, cache: Cache, progress: Progress) -> dict[str, Any]:
    budget = TimeBudget(settings.budget_seconds)
    subject = load_subject(directory, cache=cache, progress=progress)
    claim = claim_of(subject.statement, settings.claimed_epsilon)
    audit = Audit(subject, claim, settings, budget, progress, cache)
    key = {"subject": subject.digest, "settings": settings.model_dump(exclude={"parts", "fresh"})}
    # Per-record figures and what shadows learned are the auditor's; a report copies what may be shown.
    (directory.path / "audit").mkdir(mode=0o700, exist_ok=True)
    store = PartStore(directory.path / "audit" / "parts", key=key, fresh=settings.fresh)
    findings: dict[str, Finding] = {}
    seconds: dict[str, float] = {}
    wanted = [part for part in PARTS if part in settings.parts]
    with progress.task("audit", len(wanted), unit="parts") as task:
        for part in wanted:
            task.describe(part)
            began = time.monotonic()
            found = store.load(part)
            if found is None:
                sized, cost = dict(budget.sizes), len(budget.cost_in_power)
                found = _RUNNERS[part](audit)
                found.result["sizes"] = {name: size for name, size in budget.sizes.items() if name not in sized}
                found.result["cost_in_power"] = budget.cost_in_power[cost:]
                store.save(part, found)
            findings[part] = found
            seconds[part] = round(time.monotonic() - began, 3)
            task.advance()
    result = _result(audit, findings, seconds)
    files.write_json(directory.path / FILE, result)
    return result


def _result(audit: Audit, findings: dict[str, Finding], seconds: dict[str, float]) -> dict[str, Any]:
    subject, claim, config = audit.subject, audit.claim, audit.subject.config
    checks: list[Check] = [check for finding in findings.values() for check in finding.checks]
    return {
        "schema": SCHEMA,
        "verdict": verdict(checks, claimed=claim.epsilon),
        "claim": claim.to_json(),
        "checks": [_check(check) for check in checks],
        "parts": {name: finding.result for name, finding in findings.items()},
        "budget": {
            "seconds": audit.settings.budget_seconds,
            "used": round(audit.budget.used, 3),
            "seconds_by_part": seconds,
            "sizes": {k: v for finding in findings.values() for k, v in finding.result["sizes"].items()},
            "cost_in_power": [line for finding in findings.values() for line in finding.result["cost_in_power"]],
        },
        "run": {
            "run_id": subject.run_id.hex(),
            "mode": config.privacy.mode,
            "aggregator": config.federation.aggregator,
            "alpha": config.proxy.alpha,
            "rounds": config.federation.rounds,
            "cohort": config.federation.agreed_cohort,
            "clients": len(subject.text.clients),
            "data": subject.text.name,
            "canaries": config.audit.canaries,
            "secrets": config.audit.secrets,
            "subject_digest": subject.digest,
        },
        "settings": audit.settings.model_dump(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"fedpt-secure": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "violation": check.violation,
        "decisive": check.decisive,
        "alpha": check.alpha,
        "sentence": check.sentence,
        "epsilon_lower_bound": check.epsilon_lower_bound,
        "detectable_epsilon": check.detectable_epsilon,
    }
