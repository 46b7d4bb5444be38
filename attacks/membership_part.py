"""The audit's part `membership`: which records, how many of them, and what is said about the outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpt_secure.attacks.blind import blind_gate
from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.membership import (
    ADAPTER_VIEW,
    ENDPOINT_VIEW,
    adapter_scores,
    endpoint_scores,
    headline,
    view_result,
)
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.attacks.views import FORMS, Candidate
from fedpt_secure.data import Record
from fedpt_secure.errors import DataError
from fedpt_secure.progress import SILENT, Progress

MOST_AT_ADAPTER, MOST_AT_ENDPOINT = 2000, 400
"""Records of each class, where time allows."""
FEWEST = 8
"""Records of each class without which no figure means anything."""
NOT_SENT = (
    "no endpoint view: the black box is on another machine, and asking it about members would send it training records"
)
_TIMED = 4


def audit_membership(
    subject: Subject, claim: Claim, budget: TimeBudget, progress: Progress, rng: np.random.Generator
) -> Finding:
    """Attack a balanced random choice of members and held-out records of the same clients.

    Raises:
        DataError: fewer than `FEWEST` of either.
    """
    members, others = subject.members(), subject.non_members()
    if min(len(members), len(others)) < FEWEST:
        raise DataError(
            f"{len(members)} members and {len(others)} held-out records: a membership attack needs {FEWEST} of each",
            hint="--parts without membership, or a run on more records",
        )
    members, others = ([side[index] for index in rng.permutation(len(side))] for side in (members, others))
    gate = blind_gate(members[:MOST_AT_ADAPTER], others[:MOST_AT_ADAPTER], rng)
    adapter = subject.adapter_view()
    common: dict[str, Any] = {"epsilon": claim.epsilon, "delta": claim.delta, "rng": rng}
    views = []
    at_adapter = _sample(
        subject,
        members,
        others,
        MOST_AT_ADAPTER,
        budget,
        "membership at the adapter, records a class",
        0.1,
        lambda some: adapter_scores(adapter, some, SILENT),
    )
    scores = adapter_scores(adapter, at_adapter, progress)
    views.append(view_result(ADAPTER_VIEW, None, scores, _labels(at_adapter), **common))
    result: dict[str, Any] = {"members_in_run": len(members), "held_out_in_run": len(others), "gate": gate}
    if subject.black_box_is_elsewhere:
        # Members are training records, and those leave this machine for nothing: not to be audited either.
        result["endpoint_skipped"] = NOT_SENT
        progress.note(NOT_SENT)
        return Finding(result | {"views": views}, (_check(views, gate),))
    endpoint = subject.endpoint_view(progress)
    at_endpoint = _sample(
        subject,
        members,
        others,
        MOST_AT_ENDPOINT,
        budget,
        "membership at the endpoint, records a class",
        0.25,
        lambda some: endpoint_scores(endpoint, some, SILENT),
    )
    by_form = endpoint_scores(endpoint, at_endpoint, progress)
    views += [view_result(ENDPOINT_VIEW, form, by_form[form], _labels(at_endpoint), **common) for form in FORMS]
    return Finding(result | {"views": views}, (_check(views, gate),))


def _labels(candidates: Sequence[Candidate]) -> Any:
    half = len(candidates) // 2
    return np.arange(len(candidates)) < half


def _sample(
    subject: Subject,
    members: Sequence[Record],
    others: Sequence[Record],
    most: int,
    budget: TimeBudget,
    name: str,
    share: float,
    attack: Any,
) -> list[Candidate]:
    """Equal numbers of members and others, members first, as many as the budget allows."""
    wanted = min(most, len(members), len(others))
    each = 0.0
    if budget.seconds is not None:
        some = subject.candidates(members[:_TIMED])
        attack(some[:1])  # models load on the first call
        began = time.monotonic()
        attack(some)
        each = 2 * (time.monotonic() - began) / _TIMED
    count = budget.fit(
        name,
        wanted,
        seconds_each=each,
        share=share,
        minimum=FEWEST,
        consequence="false-positive rates below 2/{count} cannot be told from 0",
    )
    return subject.candidates([*members[:count], *others[:count]])


def _check(views: list[dict[str, Any]], gate: dict[str, Any]) -> Check:
    parts, above = [], False
    for view in views:
        found = headline(view)
        name = view["view"] if view["answers"] is None else f"{view['view']} ({view['answers']})"
        area = found["auc"]
        parts.append(f"{name} AUC {area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]")
        above = above or any(point["above_ceiling"] for point in found["at_fpr"])
    sentence = "membership by the base-relative score: " + ", ".join(parts)
    if not gate["passed"]:
        sentence += f"; {gate['sentence']}"
    sentence += "; above the ceiling of the claim (a hint, no proof)" if above else "; below the ceiling of the claim"
    return Check("membership", above and gate["passed"], False, 0.05, sentence)
