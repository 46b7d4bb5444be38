"""A client's own record of what its data was used for, on its own disk.

One row is one release: a noised update for one round of one run. The row and the update itself are committed in one
transaction *before* any byte of the update leaves. So

- a crash before the commit: nothing left the device, nothing is counted, the noise that was drawn is gone;
- a crash after it: the release is counted once, and a resumed round sends the *same* update (`pending`), never a
  second one with fresh noise, which would be a second release;
- a round that is over (`settle`) keeps its row and drops the update; asking for it again is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import BudgetExceeded, PrivacyError
from fedpt_secure.privacy.accounting import GaussianSteps, epsilon_spent, merge, round_up

_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    run_id           TEXT    NOT NULL,
    round_index      INTEGER NOT NULL,
    noise_multiplier REAL    NOT NULL,
    sampling_rate    REAL    NOT NULL,
    steps            INTEGER NOT NULL,
    pending          BLOB,
    PRIMARY KEY (run_id, round_index)
) STRICT
"""


class Ledger:
    """The releases of one client's data set, append-only.

    Args:
        directory: the client's own; created with access for its owner only.
        epsilon, delta: the client's budget over everything in this ledger; infinity for no limit.
    """

    def __init__(self, directory: Path, *, epsilon: float, delta: float) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = directory / "ledger.sqlite"
        self._epsilon = epsilon
        self._delta = delta
        with self._transaction() as connection:
            connection.execute(_SCHEMA)
        self._path.chmod(0o600)

    def history(self) -> tuple[GaussianSteps, ...]:
        """Everything the data was used for, over all runs, equal mechanisms added up."""
        with self._transaction() as connection:
            return _history(connection)

    def pending(self, run_id: str, round_index: int) -> npt.NDArray[np.float32] | None:
        """The update already released for a round that is not over yet, or None if there is none.

        Raises:
            PrivacyError: the round is over; its update is gone and must not be made again.
        """
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT pending FROM releases WHERE run_id = ? AND round_index = ?", (run_id, round_index)
            ).fetchone()
        if row is None:
            return None
        if row[0] is None:
            raise PrivacyError(
                f"this client has already taken part in round {round_index} of run {run_id}; "
                "a second update would spend more than was promised"
            )
        return np.frombuffer(row[0], dtype="<f4").astype(np.float32)

    def check(self, request: GaussianSteps) -> None:
        """Decline work that would pass the budget.

        Raises:
            BudgetExceeded: with the epsilon that would be reached and the budget.
        """
        with self._transaction() as connection:
            self._check(connection, request)

    def release(self, run_id: str, round_index: int, spent: GaussianSteps, update: npt.NDArray[np.float32]) -> None:
        """Count a release and keep its update until the round is over; on disk when this returns.

        The budget is checked in the same transaction, so that two processes cannot both spend the rest of it.

        Raises:
            BudgetExceeded: the budget would be passed; nothing is counted and nothing may leave.
            PrivacyError: this round already has a release.
        """
        with self._transaction() as connection:
            self._check(connection, spent)
            try:
                connection.execute(
                    "INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        run_id,
                        round_index,
                        spent.noise_multiplier,
                        spent.sampling_rate,
                        spent.steps,
                        np.ascontiguousarray(update, dtype="<f4").tobytes(),
                    ),
                )
            except sqlite3.IntegrityError:
                raise PrivacyError(f"round {round_index} of run {run_id} already has a release") from None

    def settle(self, run_id: str, *, rounds_done: int) -> None:
        """Rounds below `rounds_done` are over, completed or aborted: drop their updates, keep the count.

        Call it after the server has made the round's result durable, never before: until then a restarted round
        needs the same update again.
        """
        with self._transaction() as connection:
            connection.execute(
                "UPDATE releases SET pending = NULL WHERE run_id = ? AND round_index < ? AND pending IS NOT NULL",
                (run_id, rounds_done),
            )

    def _check(self, connection: sqlite3.Connection, request: GaussianSteps) -> None:
        if np.isinf(self._epsilon):
            return
        reached = epsilon_spent(merge((*_history(connection), request)), delta=self._delta)
        if reached > self._epsilon:
            raise BudgetExceeded(
                f"this work would bring the client to epsilon {round_up(reached)} at delta {self._delta:g}; "
                f"its budget is {self._epsilon:g}",
                hint="the client sits out; raise its budget only if its owner agrees",
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._path, isolation_level=None, timeout=30)
            try:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise PrivacyError(
                f"the client's ledger {self._path} cannot be used: {error}",
                hint="nothing was sent; without a ledger a client does not take part",
            ) from error


def _history(connection: sqlite3.Connection) -> tuple[GaussianSteps, ...]:
    rows = connection.execute("SELECT noise_multiplier, sampling_rate, steps FROM releases").fetchall()
    return merge(tuple(GaussianSteps(*row) for row in rows))
