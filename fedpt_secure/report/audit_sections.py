"""What an audit found, as sections of a report. Everything comes from `audit/audit.json` (docs/audits.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import AUDIT_FILE, RunRecord

VerdictKind = Literal["no violation detected", "violation", "not audited"]
_SMALLEST_RATE = 1e-3
_VIEW_NAMES = {"released_adapter": "the released adapter", "endpoint": "the served endpoint"}
_FORM_NAMES = {"full": "full answers", "top_k": "top-k answers", "token": "tokens only"}


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
        if "membership" in parts:
            made.append(_membership(subject, parts["membership"]))
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
    text = [str(verdict["sentence"]) + ".", f"Held to: {claim.get('sentence', claim.get('epsilon'))}."]
    text += [f"Smaller than asked, to end in time: {line}." for line in costs]
    return Section("audit", "Audit", tuple(text), tuple(items))


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


def _membership(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    source = subject.source(AUDIT_FILE)
    views = part["views"]
    headlines = [(_view_name(view), _headline(view)) for view in views]
    curves = [_curve(name, attack["roc"], colour) for colour, (name, attack) in enumerate(headlines)]
    curves.append(_curve("most that the claim allows", views[0]["ceiling"], 6))
    histogram = headlines[0][1]["histogram"]
    middles = tuple((a + b) / 2 for a, b in zip(histogram["edges"], histogram["edges"][1:], strict=False))
    shown: list[Figure | Table] = [
        Figure(
            "roc",
            "True against false positives, both on a log scale",
            Axis("false-positive rate", "log", low=_SMALLEST_RATE, high=1),
            Axis("true-positive rate", "log", low=_SMALLEST_RATE, high=1),
            tuple(curves),
            f"The headline score ({views[0]['headline']}) at each view. Left is where an attack hurts: few false "
            f"alarms. Rates below {_SMALLEST_RATE:g} are drawn at {_SMALLEST_RATE:g}. A curve above the ceiling is a "
            "hint, no proof: the records share one split and one training.",
            source,
        ),
        Figure(
            "scores",
            f"Scores of members and others, {headlines[0][0]}",
            Axis(f"score {views[0]['headline']}"),
            Axis("records"),
            tuple(
                Series(name, "bars", middles, tuple(map(float, histogram[key])), colour=colour)
                for name, key, colour in (("members", "members", 1), ("held out", "non_members", 0))
            ),
            "The more the two overlap, the less membership shows.",
            source,
        ),
        Table(
            "membership",
            "Membership inference",
            ("view", "score", "AUC", "balanced accuracy", "TPR at 1 % FPR", "TPR at 0.1 % FPR"),
            tuple(_attack_row(_view_name(view), attack) for view in views for attack in view["attacks"]),
            f"{views[0]['members']} members and {views[0]['non_members']} held-out records at the first view; "
            "thresholds chosen on one half, judged on the other; Clopper-Pearson intervals, 95 %.",
            source,
        ),
    ]
    gate = part["gate"]
    text = (
        f"Gate: {gate['sentence']} (AUC of a bag-of-words classifier {_estimate(gate['auc'])}).",
        "An adversary who holds the adapter, or asks the endpoint, guesses whether a record was trained on.",
    )
    return Section("membership-inference", "Membership inference", text, tuple(shown))


def _curve(name: str, rates: Mapping[str, Sequence[float]], colour: int) -> Series:
    """A ROC curve within the figure: what lies below the smallest rate lies on its edge."""
    points = [
        (max(x, _SMALLEST_RATE), max(y, _SMALLEST_RATE))
        for x, y in zip(rates["fpr"], rates["tpr"], strict=True)
        if x >= _SMALLEST_RATE or y >= _SMALLEST_RATE
    ]
    return Series(name, "line", tuple(x for x, _ in points), tuple(y for _, y in points), colour=colour)


def _attack_row(view: str, attack: Mapping[str, Any]) -> tuple[str, ...]:
    cells = [view, str(attack["score"]), _estimate(attack["auc"]), _estimate(attack["balanced_accuracy"])]
    for level in attack["at_fpr"]:
        cells.append(_estimate(level["tpr"]) if level["resolvable"] else "too few records")
    return tuple(cells)


def _view_name(view: Mapping[str, Any]) -> str:
    name = _VIEW_NAMES.get(view["view"], str(view["view"]))
    return name if view["answers"] is None else f"{name}, {_FORM_NAMES.get(view['answers'], view['answers'])}"


def _headline(view: Mapping[str, Any]) -> Mapping[str, Any]:
    for attack in view["attacks"]:
        if attack["score"] == view["headline"]:
            found: Mapping[str, Any] = attack
            return found
    raise ValueError(f"view {view['view']!r} lacks its headline score")


def _estimate(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
