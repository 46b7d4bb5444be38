"""A client's own record of what its data was used for, and of what its owner allows, on its own disk.

One row of `releases` is one noised update for one round of one run. The row is committed *before* any byte of the
update leaves. So a crash before the commit costs nothing, because nothing left the device and the noise that was drawn
is gone; a crash after it counts a release that may never have left. The ledger over-counts, it never under-counts.

What may be sent again after a crash depends on where the noise is born:

- `local`: the update carries all the noise its privacy needs, and is committed with the row. A restarted round sends
  the *same* update (`pending`); repeating an output reveals nothing new.
- `distributed`, `client`: the update carries a share of the noise only, and is not kept. Two sums of one round over
  different survivors would hold the same share twice, and their difference would hide single updates behind less noise
  than was promised. The client sits the round out.

The ledger also remembers which sessions the client has joined and which rounds it has helped to open. Two sums of one
round over different survivors differ by single updates, so a client opens a round at most once (docs/protocol.md).

The budget is the owner's, over all runs and servers. It lies in the ledger, and no server is asked for it.
"""

from __future__ import annotations

import datetime
import math
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import AlreadyReleased, BudgetExceeded, PrivacyError
from fedpt_secure.privacy.accounting import GaussianSteps, epsilon_spent, merge, round_up
from fedpt_secure.privacy.budget import Budget, Mode, Unit, charge
from fedpt_secure.privacy.ledger_file import NAME, LedgerFile, append


@dataclass(frozen=True, slots=True)
class Release:
    """One row: what was released, by which mechanism, and whether its noise was secret."""

    round_index: int
    spent: GaussianSteps
    mode: Mode
    noise_is_private: bool


class Ledger:
    """The releases of one client's data set and its owner's budget, append-only.

    **Guarantees** What `release` returned from is counted for good, against the owner's last budget. Processes that use
    one ledger at once cannot together pass the budget.

    **Assumptions** The client's disk keeps what it has flushed. The file is not replaced by an older copy of itself.

    Args:
        directory: the client's own, with a ledger in it (`create`).

    Raises:
        LedgerError: there is no ledger, or it is damaged, changed by hand, or of another version. A missing ledger is
            never replaced by an empty one, which would forget what was spent.
    """

    def __init__(self, directory: Path) -> None:
        self._file = LedgerFile(directory / NAME)
        self._names_are_durable = False

    @classmethod
    def create(cls, directory: Path, *, budget: Budget) -> Ledger:
        """Begin a data set's ledger, with access for its owner only.

        One that is there already is opened instead, and keeps its own budget: only its owner changes that, by
        `set_budget`.

        Raises:
            LedgerError: it cannot be written, or what is there is damaged.
        """
        path = directory / NAME
        if not path.exists():
            LedgerFile.create(path, budget=_budget_row(budget))
        return cls(directory)

    @property
    def budget(self) -> Budget:
        """The budget in force: the last one that was set."""
        return self.budgets()[-1]

    def budgets(self) -> tuple[Budget, ...]:
        """Every budget there ever was, the first one first."""
        with self._file.transaction() as connection:
            return _budgets(connection)

    def set_budget(self, budget: Budget, *, confirm_raise: bool = False) -> float:
        """Replace the budget; the one before stays visible.

        A budget below what is spent is taken: it cannot undo anything, but declines all further work.

        Args:
            confirm_raise: the owner agrees that more than before may be spent.

        Returns:
            What is spent, in the new budget's unit and at its delta.

        Raises:
            UnitNotCovered: the new unit is the client and record-level releases were made, whose cost to the client as
                a whole nobody knows.
            PrivacyError: more is allowed than before, without `confirm_raise`.
        """
        with self._file.transaction() as connection:
            before = _budgets(connection)[-1]
            spent = epsilon_spent(_history(connection, budget.unit), delta=budget.delta)
            if budget.allows_more_than(before) and not confirm_raise:
                raise PrivacyError(
                    f"epsilon {budget.epsilon:g} at delta {budget.delta:g} for a {budget.unit} allows more than the "
                    f"budget in force, epsilon {before.epsilon:g} at delta {before.delta:g} for a {before.unit}; "
                    "what is spent is never given back",
                    hint="if the data's owner agrees: --confirm-raise",
                )
            append(connection, "budgets", _budget_row(budget), refusal="")
        return spent

    def history(self) -> tuple[GaussianSteps, ...]:
        """Everything the data was used for, over all runs, as charged to the budget; equal mechanisms added up."""
        with self._file.transaction() as connection:
            return _history(connection, _budgets(connection)[-1].unit)

    def spent(self) -> float:
        """Epsilon spent so far, in the budget's unit and at its delta; an upper bound."""
        with self._file.transaction() as connection:
            budget = _budgets(connection)[-1]
            return epsilon_spent(_history(connection, budget.unit), delta=budget.delta)

    def entries(self) -> int:
        """How many there are of all kinds; it only grows, so that an older copy of the file has fewer."""
        tables = ("releases", "budgets", "sessions", "opened")
        with self._file.transaction() as connection:
            counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]  # noqa: S608
        return sum(counts)

    def runs(self) -> tuple[str, ...]:
        """The runs that something was released to, in order of their first release."""
        with self._file.transaction() as connection:
            rows = connection.execute("SELECT run_id FROM releases GROUP BY run_id ORDER BY min(entry)").fetchall()
        return tuple(row[0] for row in rows)

    def releases(self, run_id: str) -> tuple[Release, ...]:
        """The releases to one run, by round."""
        with self._file.transaction() as connection:
            rows = connection.execute(
                "SELECT round_index, noise_multiplier, sampling_rate, steps, mode, noise_is_private FROM releases "
                "WHERE run_id = ? ORDER BY round_index",
                (run_id,),
            ).fetchall()
        return tuple(Release(row[0], GaussianSteps(*row[1:4]), row[4], bool(row[5])) for row in rows)

    def pending(self, run_id: str, round_index: int) -> npt.NDArray[np.float64] | None:
        """The update already released for a round that is not over yet, or None if nothing was released.

        Raises:
            AlreadyReleased: something was, and cannot be sent again: the round is over, or its noise was a share.
        """
        with self._file.transaction() as connection:
            row = connection.execute(
                "SELECT pending FROM releases WHERE run_id = ? AND round_index = ?", (run_id, round_index)
            ).fetchone()
        if row is None:
            return None
        if row[0] is None:
            raise AlreadyReleased(
                f"this client has already taken part in round {round_index} of run {run_id}; "
                "a second update would spend more than was promised"
            )
        return np.frombuffer(row[0], dtype="<f8").astype(np.float64)

    def check(self, request: GaussianSteps, *, mode: Mode, noise_is_private: bool) -> None:
        """Decline work that would pass the budget. Noise that others can recompute counts as none.

        Raises:
            BudgetExceeded: with the epsilon that would be reached and the budget.
            UnitNotCovered: the budget is for the whole client, the work protects single records.
        """
        with self._file.transaction() as connection:
            charged = charge(_protecting(request, noise_is_private), mode, _budgets(connection)[-1].unit)
            _check(connection, charged)

    def release(
        self,
        run_id: str,
        round_index: int,
        spent: GaussianSteps,
        update: npt.NDArray[np.float64] | None,
        *,
        mode: Mode,
        noise_is_private: bool,
    ) -> None:
        """Count a release; on disk when this returns, and before a byte of it may leave.

        The budget is checked in the same transaction, so that two processes cannot both spend the rest of it.

        Args:
            spent: what the release costs a unit of `mode`, in the worst case that the client agreed to.
            update: in mode `local`, what is kept until the round is over, to be sent again after a crash; None in the
                other modes, whose updates must not be sent twice.

        Raises:
            BudgetExceeded: the budget would be passed; nothing is counted and nothing may leave.
            AlreadyReleased: this round already has a release.
            PrivacyError: an update to keep in a mode that must not repeat it.
        """
        if (update is not None) != (mode == "local"):
            raise PrivacyError(
                f"a release of mode {mode} with{'' if update is not None else 'out'} an update to keep: only in mode "
                "local does an update carry all the noise that repeating it needs"
            )
        row = (
            run_id,
            round_index,
            float(spent.noise_multiplier),
            float(spent.sampling_rate),
            int(spent.steps),
            mode,
            int(noise_is_private),
        )
        if not self._names_are_durable:
            self._file.sync_names()
            self._names_are_durable = True
        with self._file.transaction() as connection:
            charged = charge(_protecting(spent, noise_is_private), mode, _budgets(connection)[-1].unit)
            _check(connection, charged)
            append(
                connection,
                "releases",
                row,
                refusal=f"round {round_index} of run {run_id} already has a release",
                pending=None if update is None else np.ascontiguousarray(update, dtype="<f8").tobytes(),
            )

    def settle(self, run_id: str, *, rounds_done: int) -> None:
        """Rounds below `rounds_done` are over, completed or aborted: drop their updates, keep the count.

        Call it after the server has made the round's result durable, never before: until then a restarted round
        needs the same update again.
        """
        with self._file.transaction() as connection:
            connection.execute(
                "UPDATE releases SET pending = NULL WHERE run_id = ? AND round_index < ? AND pending IS NOT NULL",
                (run_id, rounds_done),
            )

    def begin_session(self, run_id: str, round_index: int, attempt: int) -> None:
        """Note that the client joins an attempt of a round.

        Raises:
            AlreadyReleased: it has joined this attempt before, or has helped to open the round.
        """
        with self._file.transaction() as connection:
            _refuse_opened(connection, run_id, round_index)
            again = f"attempt {attempt} of round {round_index} was joined before"
            append(connection, "sessions", (run_id, round_index, attempt), refusal=again)

    def open_round(self, run_id: str, round_index: int) -> None:
        """Note, before they leave, that the client reveals the shares that open a round's sum.

        Raises:
            AlreadyReleased: it has done so before.
        """
        with self._file.transaction() as connection:
            _refuse_opened(connection, run_id, round_index)
            append(connection, "opened", (run_id, round_index), refusal="the round was opened before")


def _refuse_opened(connection: sqlite3.Connection, run_id: str, round_index: int) -> None:
    query = "SELECT 1 FROM opened WHERE run_id = ? AND round_index = ?"
    if connection.execute(query, (run_id, round_index)).fetchone():
        raise AlreadyReleased(
            f"this client has helped to open round {round_index} already; a second sum over the same updates would "
            "give single updates away",
            hint="the round counts as lost; go on with the next one",
        )


def _check(connection: sqlite3.Connection, charged: GaussianSteps) -> None:
    budget = _budgets(connection)[-1]
    if math.isinf(budget.epsilon):
        return
    reached = epsilon_spent(merge((*_history(connection, budget.unit), charged)), delta=budget.delta)
    if reached > budget.epsilon:
        raise BudgetExceeded(
            f"this work would bring the client to epsilon {round_up(reached)} at delta {budget.delta:g} for a "
            f"{budget.unit}; its budget is {budget.epsilon:g}",
            hint="the client sits out; raise its budget only if its owner agrees: `fedpt-secure ledger set-budget`",
        )


def _history(connection: sqlite3.Connection, unit: Unit) -> tuple[GaussianSteps, ...]:
    rows = connection.execute(
        "SELECT noise_multiplier, sampling_rate, mode, noise_is_private, sum(steps) FROM releases GROUP BY 1, 2, 3, 4"
    ).fetchall()
    counted = ((_protecting(GaussianSteps(row[0], row[1], row[4]), bool(row[3])), row[2]) for row in rows)
    return merge(tuple(charge(spent, mode, unit) for spent, mode in counted))


def _protecting(spent: GaussianSteps, noise_is_private: bool) -> GaussianSteps:
    """What a release cost: noise from a seed protects nothing."""
    return spent if noise_is_private else replace(spent, noise_multiplier=0.0)


def _budgets(connection: sqlite3.Connection) -> tuple[Budget, ...]:
    rows = connection.execute("SELECT epsilon, delta, unit, set_at, set_by FROM budgets ORDER BY entry").fetchall()
    return tuple(Budget(*row) for row in rows)


def _budget_row(budget: Budget) -> tuple[float, float, str, str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    stamped = replace(budget, set_at=now)
    return float(stamped.epsilon), float(stamped.delta), stamped.unit, stamped.set_at, stamped.set_by
