"""What a part of an audit yields, and the verdict over all parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One question with an answer.

    Attributes:
        name: unique in an audit.
        violation: the claim does not hold, or a guarantee is broken.
        decisive: counts for the verdict. What is not decisive is shown, but proves nothing.
        alpha: chance that a correct run is called a violation here; 0 where nothing is drawn.
        sentence: the answer, for people.
        epsilon_lower_bound: measured, where the check measures one.
        detectable_epsilon: the largest epsilon that a flawless attack of this size could have proved.
    """

    name: str
    violation: bool
    decisive: bool
    alpha: float
    sentence: str
    epsilon_lower_bound: float | None = None
    detectable_epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A part's result as JSON values (docs/audits.md has the fields), and its checks."""

    result: dict[str, Any]
    checks: tuple[Check, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """For the store of partial results."""
        return {"result": self.result, "checks": [dataclasses.asdict(check) for check in self.checks]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Finding:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        return cls(dict(content["result"]), tuple(Check(**item) for item in content["checks"]))


def verdict(checks: Sequence[Check], *, claimed: float | None) -> dict[str, Any]:
    """What all checks together say (docs/audits.md)."""
    decisive = [check for check in checks if check.decisive]
    violations = [check.name for check in decisive if check.violation]
    bounds = [check.epsilon_lower_bound for check in decisive if check.epsilon_lower_bound is not None]
    reach = [check.detectable_epsilon for check in decisive if check.detectable_epsilon is not None]
    measured, detectable = max(bounds, default=None), max(reach, default=None)
    if violations:
        reasons = "; ".join(check.sentence for check in decisive if check.violation)
        sentence = f"violation: {reasons}"
    elif detectable is None:
        sentence = "no violation detected; nothing measured an epsilon (plant canaries to measure the run itself)"
    else:
        sentence = f"no violation detected; could have detected eps > {detectable:.2f}"
    if claimed is None and not violations:
        sentence += "; the run claims no epsilon, so that there is none to violate"
    return {
        "violation": bool(violations),
        "violations": violations,
        "sentence": sentence,
        "epsilon_lower_bound": measured,
        "detectable_epsilon": detectable,
        "false_alarm_bound": round(sum(check.alpha for check in decisive), 12),
    }
