"""What an audit found, as sections of a report. Everything comes from `audit/audit.json` (docs/audits.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.report.attack_sections import PART_SECTIONS
from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import AUDIT_FILE, RunRecord

VerdictKind = Literal["no violation detected", "violation", "not audited"]


def audit_verdict(run: RunRecord) -> tuple[VerdictKind, str]:
    """What the first screen says of the audit.

    Raises:
        RunDirectoryError: the audit has no verdict.
    """
    if run.audit is None:
        return (
            "not audited",
            "This run was not audited; `fedpt-secure audit --run DIR` attacks it as an adversary would.",
        )
    verdict = run.audit.get("verdict")
    if not isinstance(verdict, Mapping) or not isinstance(verdict.get("violation"), bool) or "sentence" not in verdict:
        raise RunDirectoryError(
            f"{run.path / AUDIT_FILE} has no verdict", hint="run `fedpt-secure audit` again, with this version"
        )
    return ("violation" if verdict["violation"] else "no violation detected"), str(verdict["sentence"])


def audit_sections(subject: RunRecord, runs: Sequence[RunRecord]) -> tuple[Section, ...]:
    """The sections on all parts that the audit ran; none where there was no audit.

    Raises:
        RunDirectoryError: the audit's file lacks what its schema promises.
    """
    audit = subject.audit
    if audit is None:
        return ()
    try:
        parts = audit["parts"]
        made = [_overview(subject, audit, runs)]
        made += [section(subject, parts[part]) for part, section in PART_SECTIONS.items() if part in parts]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise RunDirectoryError(
            f"{subject.path / AUDIT_FILE} lacks what its schema promises: {error!r}",
            hint="run `fedpt-secure audit` again, with this version",
        ) from error
    return tuple(made)


def _overview(subject: RunRecord, audit: Mapping[str, Any], runs: Sequence[RunRecord]) -> Section:
    verdict, claim = audit["verdict"], audit["claim"]
    rows = tuple(
        (
            str(check["name"]).replace("_", " "),
            "violation" if check["violation"] else "no violation",
            "yes" if check["decisive"] else "no",
            f"{check['alpha']:g}" if check["alpha"] else "exact",
            _bound(check["epsilon_lower_bound"]),
            _bound(check["detectable_epsilon"]),
            str(check["sentence"]),
        )
        for check in audit["checks"]
    )
    source = subject.source(AUDIT_FILE)
    items: list[Figure | Table] = [
        Table(
            "checks",
            "All checks",
            ("check", "outcome", "decides", "false-alarm rate", "measured epsilon", "could have detected", "answer"),
            rows,
            f"Together a correct run is called a violation with probability at most {verdict['false_alarm_bound']:g}.",
            source,
        )
    ]
    if (figure := _claimed_and_measured(runs)) is not None:
        items.insert(0, figure)
    costs = audit["budget"]["cost_in_power"]
    text = [str(verdict["sentence"]) + ".", _held_to(claim)]
    text += [f"Smaller than asked, to end in time: {line}." for line in costs]
    return Section("audit", "Audit", tuple(text), tuple(items))


def _held_to(claim: Mapping[str, Any]) -> str:
    if claim["epsilon"] is None:
        return "The run claims no epsilon, so that there is none to hold it to."
    return (
        f"Held to epsilon {claim['epsilon']:g} at delta = {claim['delta']:g} for each {claim['unit']}; neighbouring: "
        f"{claim['neighbouring']}; from {claim['source']}."
    )


def _claimed_and_measured(runs: Sequence[RunRecord]) -> Figure | None:
    """Claimed upper bound, measured lower bound and what could have been detected, by run."""
    names: list[str] = []
    claimed: list[tuple[float, float]] = []
    measured: list[tuple[float, float]] = []
    detectable: list[tuple[float, float]] = []
    for run in runs:
        if run.audit is None:
            continue
        place = float(len(names))
        names.append(run.name)
        verdict = run.audit["verdict"]
        for into, value in (
            (claimed, run.audit["claim"]["epsilon"]),
            (measured, verdict["epsilon_lower_bound"]),
            (detectable, verdict["detectable_epsilon"]),
        ):
            if value is not None and math.isfinite(value):
                into.append((place, float(value)))
    series = tuple(
        Series(name, "points", tuple(x for x, _ in points), tuple(y for _, y in points), colour=colour)
        for name, points, colour in (
            ("claimed, upper bound", claimed, 0),
            ("measured, lower bound", measured, 1),
            ("could have been detected", detectable, 2),
        )
        if points
    )
    if not series:
        return None
    return Figure(
        "claimed-and-measured",
        "Claimed against measured epsilon",
        Axis("run", "categories", tuple(names)),
        Axis("epsilon", low=0),
        series,
        "A measured lower bound above the claim would be a violation. What lies between is not known: an attack "
        "bounds epsilon from below only.",
        tuple(source for run in runs if run.audit is not None for source in run.source(AUDIT_FILE)),
    )


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
