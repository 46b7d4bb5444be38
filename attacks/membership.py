"""Membership inference: which records were trained on, seen from the adapter and from the endpoint.

Views, scores and analysis are apart: `views` gives signals, `scores` a number a record, `operating_points` what the
numbers prove. None of it decides a verdict: members and non-members come from one split of a fixed size and one
training, so that hits are not independent trials, and a figure above the ceiling is a strong hint, no proof. The
canaries' coins are independent, and prove (`one_run`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.attacks.operating_points import analyse, ceiling_curve
from fedpt_secure.attacks.scores import HEADLINE, MOMENT_FREE_SCORES, SCORES, TOKEN_SCORES, RecordSignals
from fedpt_secure.attacks.views import FORMS, Candidate, Endpoint, ReleasedAdapter, endpoint_signals
from fedpt_secure.progress import Progress

Scores = dict[str, npt.NDArray[np.float64]]

ADAPTER_VIEW, ENDPOINT_VIEW = "released_adapter", "endpoint"
_OF_FORM = {"full": tuple(SCORES), "top_k": MOMENT_FREE_SCORES, "token": TOKEN_SCORES}


def adapter_scores(view: ReleasedAdapter, candidates: Sequence[Candidate], progress: Progress) -> Scores:
    """Every score of every candidate, from the released adapter: name -> `[candidates]`."""
    rows = []
    with progress.task("membership: adapter", len(candidates), unit="records") as task:
        for signals in view.signals(candidates):
            rows.append([SCORES[name](signals) for name in SCORES])
            task.advance()
    return _columns(rows, SCORES)


def endpoint_scores(view: Endpoint, candidates: Sequence[Candidate], progress: Progress) -> dict[str, Scores]:
    """The same from an endpoint's answers, by form of answer, in one pass over the models."""
    rows: dict[str, list[list[float]]] = {form: [] for form in FORMS}
    with progress.task("membership: endpoint", len(candidates), unit="records") as task:
        for candidate, (served, public) in zip(candidates, view.answers(candidates), strict=True):
            for form in FORMS:
                signals: RecordSignals = endpoint_signals(served[form], public[form], candidate)
                rows[form].append([SCORES[name](signals) for name in _OF_FORM[form]])
            task.advance()
    return {form: _columns(rows[form], _OF_FORM[form]) for form in FORMS}


def view_result(
    view: str,
    answers: str | None,
    scores: Scores,
    is_member: npt.NDArray[np.bool_],
    *,
    epsilon: float | None,
    delta: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The analysis of all scores of one view."""
    return {
        "view": view,
        "answers": answers,
        "headline": HEADLINE,
        "members": int(is_member.sum()),
        "non_members": int((~is_member).sum()),
        "attacks": [
            {"score": name} | analyse(values[is_member], values[~is_member], epsilon=epsilon, delta=delta, rng=rng)
            for name, values in scores.items()
        ],
        "ceiling": ceiling_curve(epsilon=epsilon, delta=delta),
    }


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The headline attack of a view's result."""
    return next(attack for attack in result["attacks"] if attack["score"] == result["headline"])


def _columns(rows: list[list[float]], names: Iterable[str]) -> Scores:
    values = np.array(rows, dtype=np.float64)
    return {name: values[:, index] for index, name in enumerate(names)}
