"""What is in a client's ledger, for its owner: releases by run, what they cost, what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedpt_secure.errors import LedgerError, PrivacyError
from fedpt_secure.privacy import ACCOUNTANT, Budget, Ledger, Release, Unit, epsilon_spent, round_up
from fedpt_secure.privacy.budget import charge
from fedpt_secure.privacy.ledger_file import NAME

_NEIGHBOURING: dict[Unit, str] = {
    "record": "add or remove one record of this client",
    "client": "this client's records all there, or none of them",
}
_ADVERSARY = (
    "anyone who sees all that the client ever sent in mode local; in modes distributed and client the servers, each "
    "with as many clients of a round as its run's terms tolerated; all of them together"
)


@dataclass(frozen=True, slots=True)
class RunSpend:
    """What one run was given.

    Attributes:
        epsilon: of this run alone, in the budget's unit and at its delta; None where nothing is promised.
    """

    run_id: str
    modes: tuple[str, ...]
    releases: int
    steps: int
    noise_is_private: bool
    epsilon: float | None


@dataclass(frozen=True, slots=True)
class LedgerSummary:
    """One ledger.

    Attributes:
        budgets: every one there was; the last is in force.
        epsilon: spent, rounded up; None where nothing is promised (no noise, or noise from a seed).
        left: the budget less that, rounded down; None without a limit, 0 where nothing is promised. What a further
            release would add depends on it: costs of different releases do not add up, they compose.
    """

    directory: Path
    budgets: tuple[Budget, ...]
    runs: tuple[RunSpend, ...]
    epsilon: float | None
    left: float | None

    @property
    def budget(self) -> Budget:
        """In force."""
        return self.budgets[-1]

    def claim(self) -> str:
        """What the spend means, in one sentence."""
        spent = "NOTHING IS PROMISED" if self.epsilon is None else f"epsilon <= {self.epsilon:g}"
        budget = self.budget
        return (
            f"{spent} at delta = {budget.delta:g} for each {budget.unit}; neighbouring: {_NEIGHBOURING[budget.unit]}; "
            f"against {_ADVERSARY}. Accountant: {ACCOUNTANT}."
        )

    def to_json(self) -> dict[str, Any]:
        """For programs. Infinity is null."""
        return {
            "directory": str(self.directory),
            "claim": self.claim(),
            "budget": _budget(self.budget),
            "spent": {
                "epsilon": self.epsilon,
                "delta": self.budget.delta,
                "unit": self.budget.unit,
                "neighbouring": _NEIGHBOURING[self.budget.unit],
                "adversary": _ADVERSARY,
                "accountant": ACCOUNTANT,
            },
            "left": self.left,
            "runs": [
                {
                    "run_id": run.run_id,
                    "modes": list(run.modes),
                    "releases": run.releases,
                    "steps": run.steps,
                    "noise_is_private": run.noise_is_private,
                    "epsilon": run.epsilon,
                }
                for run in self.runs
            ],
            "budgets": [_budget(item) for item in self.budgets],
        }


def find_ledgers(directory: Path) -> list[Path]:
    """The directory itself, if a ledger is in it; else those in it, or in its `clients` folder, that have one.

    Raises:
        LedgerError: there is none.
    """
    if (directory / NAME).exists():
        return [directory]
    for place in (directory, directory / "clients"):
        if place.is_dir() and (found := sorted(entry for entry in place.iterdir() if (entry / NAME).exists())):
            return found
    raise LedgerError(
        f"there is no ledger in {directory}",
        hint="a client's own directory, a run directory, or what --ledgers named; `ledger set-budget --create` "
        "begins one",
    )


def summarise_ledger(directory: Path) -> LedgerSummary:
    """Read one ledger.

    Raises:
        LedgerError: missing, damaged, changed by hand, or of another version.
    """
    ledger = Ledger(directory)
    budgets = ledger.budgets()
    budget = budgets[-1]
    by_run = {run_id: ledger.releases(run_id) for run_id in ledger.runs()}
    everything = [release for releases in by_run.values() for release in releases]
    epsilon = _epsilon(everything, budget)
    if math.isinf(budget.epsilon):
        left = None
    else:
        left = 0.0 if epsilon is None else max(0.0, math.floor((budget.epsilon - epsilon) * 1000) / 1000)
    runs = tuple(
        RunSpend(
            run_id=run_id,
            modes=tuple(sorted({release.mode for release in releases})),
            releases=len(releases),
            steps=sum(release.spent.steps for release in releases),
            noise_is_private=all(release.noise_is_private for release in releases),
            epsilon=_epsilon(releases, budget),
        )
        for run_id, releases in by_run.items()
    )
    return LedgerSummary(directory, budgets, runs, epsilon, left)


def change_budget(
    directory: Path,
    *,
    epsilon: float,
    delta: float | None,
    unit: str | None,
    by: str,
    create: bool,
    confirm_raise: bool,
) -> float:
    """Set a client's budget, or begin its ledger with one.

    Args:
        delta, unit: None keeps what is in force.
        create: begin a ledger if there is none.

    Returns:
        Epsilon spent so far, in the new budget's unit and at its delta.

    Raises:
        LedgerError: there is no ledger and none is to be begun, or it is damaged.
        PrivacyError: no budget, or one that allows more than before without `confirm_raise`.
    """
    if create and not (directory / NAME).exists():
        Ledger.create(
            directory, budget=Budget(epsilon, 1e-5 if delta is None else delta, _unit(unit or "record"), set_by=by)
        )
        return 0.0
    if not (directory / NAME).exists():
        raise LedgerError(f"there is no ledger in {directory}", hint="--create begins one")
    ledger = Ledger(directory)
    before = ledger.budget
    wanted = Budget(epsilon, before.delta if delta is None else delta, _unit(unit or before.unit), set_by=by)
    return ledger.set_budget(wanted, confirm_raise=confirm_raise)


def _unit(text: str) -> Unit:
    units: tuple[Unit, ...] = get_args(Unit)
    for unit in units:
        if text == unit:
            return unit
    raise PrivacyError(f"a budget's unit is record or client, not {text!r}")


def _epsilon(releases: list[Release] | tuple[Release, ...], budget: Budget) -> float | None:
    if not all(release.noise_is_private for release in releases):
        return None
    charges = sorted(
        (charge(release.spent, release.mode, budget.unit) for release in releases),
        key=lambda spent: (spent.noise_multiplier, spent.sampling_rate, spent.steps),
    )
    spent = epsilon_spent(tuple(charges), delta=budget.delta)
    return round_up(spent) if math.isfinite(spent) else None


def _budget(budget: Budget) -> dict[str, Any]:
    return {
        "epsilon": budget.epsilon if math.isfinite(budget.epsilon) else None,
        "delta": budget.delta,
        "unit": budget.unit,
        "set_at": budget.set_at,
        "set_by": budget.set_by,
    }
