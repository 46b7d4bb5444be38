"""Can members be told from non-members without any model? Then a membership attack would measure the split.

A classifier sees the words of the records and nothing else. If its AUC interval covers 0.5, the split gives nothing
away that words can; if not, whatever an attack finds may be that (Duan et al. 2024; Das, Zhang and Tramer 2024).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.attacks.operating_points import auc
from fedpt_secure.data import Record

_MOST_WORDS = 5000


def blind_gate(
    members: Sequence[Record], others: Sequence[Record], rng: np.random.Generator, *, alpha: float = 0.05
) -> dict[str, Any]:
    """AUC of a bag-of-words classifier on records it was not taught with, and its interval; must cover 0.5."""
    counts, labels = _bag([*members, *others]), np.array([True] * len(members) + [False] * len(others))
    # One half teaches and the other judges, classes in equal parts: pooled folds would pull the area below 0.5.
    teaches = np.zeros(len(labels), dtype=np.bool_)
    for side in (np.flatnonzero(labels), np.flatnonzero(~labels)):
        teaches[rng.permutation(side)[: len(side) // 2]] = True
    weights = _log_odds(counts[teaches], labels[teaches])
    judged, scores = labels[~teaches], counts[~teaches] @ weights
    area = auc(scores[judged], scores[~judged], alpha=alpha)
    passed = area["low"] <= 0.5 <= area["high"]
    return {
        "auc": area,
        "passed": passed,
        "sentence": "words alone do not tell members from non-members"
        if passed
        else "words alone tell members from non-members: what the attacks find may be the split, not the model",
    }


def _log_odds(counts: npt.NDArray[np.float64], labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Multinomial naive Bayes with Laplace smoothing: log-odds of each word, and none for the class sizes."""
    logs = []
    for side in (labels, ~labels):
        total = counts[side].sum(0) + 1
        logs.append(np.log(total / total.sum()))
    return np.asarray(logs[0] - logs[1])


def _bag(records: Sequence[Record]) -> npt.NDArray[np.float64]:
    """Counts of the commonest words, `[records, words]`; a record's length stands in as a word of its own."""
    bags = [Counter(re.findall(r"\w+|[^\w\s]", f"{record.prompt} {record.text}".lower())) for record in records]
    for bag in bags:
        bag[f"length {sum(bag.values()).bit_length()}"] = 1
    common = Counter(word for bag in bags for word in bag).most_common(_MOST_WORDS)
    column = {word: index for index, (word, _) in enumerate(common)}
    counts = np.zeros((len(bags), len(column)))
    for row, bag in enumerate(bags):
        for word, count in bag.items():
            if word in column:
                counts[row, column[word]] = count
    return counts
