"""Audits: what an adversary gets out of a finished run, and whether its promise holds (docs/audits.md)."""

from fedpt_secure.attacks.audit import SCHEMA, run_audit
from fedpt_secure.attacks.findings import Check, Finding, verdict
from fedpt_secure.attacks.settings import PARTS, AuditSettings, TimeBudget, parse_duration
from fedpt_secure.attacks.subject import Claim, Subject, load_subject

__all__ = [
    "PARTS",
    "SCHEMA",
    "AuditSettings",
    "Check",
    "Claim",
    "Finding",
    "Subject",
    "TimeBudget",
    "load_subject",
    "parse_duration",
    "run_audit",
    "verdict",
]
