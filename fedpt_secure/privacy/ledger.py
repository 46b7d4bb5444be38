"""A client's own record of what its data was used for, on its own disk.

One row of `releases` is one noised update for one round of one run. The row and the update itself are committed in one
transaction *before* any byte of the update leaves. So

- a crash before the commit: nothing left the device, nothing is counted, the noise that was drawn is gone;
- a crash after it: the release is counted once, and a restarted round sends the *same* update (`pending`), never a
  second one with fresh noise, which would be a second release;
- a round that is over (`settle`) keeps its row and drops the update; asking for it again is refused.

The ledger also remembers which sessions the client has joined and which rounds it has helped to open. Two sums of one
round over different survivors differ by single updates, so a client opens a round at most once (docs/protocol.md).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import AlreadyReleased, BudgetExceeded, LedgerError
from fedpt_secure.privacy.accounting import GaussianSteps, epsilon_spent, merge, round_up

_FORMAT = "fedpt-secure ledger 1"
_SCHEMA = (
    "CREATE TABLE meta (format TEXT NOT NULL) STRICT",
    """CREATE TABLE releases (
        run_id           TEXT    NOT NULL,
        round_index      INTEGER NOT NULL,
        noise_multiplier REAL    NOT NULL,
        sampling_rate    REAL    NOT NULL,
        steps            INTEGER NOT NULL,
        noise_is_private INTEGER NOT NULL,
        pending          BLOB,
        PRIMARY KEY (run_id, round_index)
    ) STRICT""",
    """CREATE TABLE sessions (
        run_id TEXT NOT NULL, round_index INTEGER NOT NULL, attempt INTEGER NOT NULL,
        PRIMARY KEY (run_id, round_index, attempt)
    ) STRICT""",
    """CREATE TABLE opened (
        run_id TEXT NOT NULL, round_index INTEGER NOT NULL, PRIMARY KEY (run_id, round_index)
    ) STRICT""",
)


@dataclass(frozen=True, slots=True)
class Release:
    """One row: what was released, and whether its noise was secret."""

    round_index: int
    spent: GaussianSteps
    noise_is_private: bool


class Ledger:
    """The releases of one client's data set, append-only.

    Args:
        directory: the client's own, with a ledger in it (`create`).
        epsilon, delta: the client's budget over everything in this ledger; infinity for no limit.

    Raises:
        LedgerError: there is no ledger, or it is damaged. A missing ledger is never replaced by an empty one, which
            would forget what was spent.
    """

    def __init__(self, directory: Path, *, epsilon: float, delta: float) -> None:
        self._path = directory / "ledger.sqlite"
        self._epsilon = epsilon
        self._delta = delta
        with self._transaction() as connection:
            if connection.execute("SELECT format FROM meta").fetchall() != [(_FORMAT,)]:
                raise LedgerError(f"{self._path} is not a ledger of this program's format")

    @classmethod
    def create(cls, directory: Path, *, epsilon: float, delta: float) -> Ledger:
        """Begin a data set's ledger, with access for its owner only; one that is there already is opened instead.

        Raises:
            LedgerError: it cannot be written, or what is there is damaged.
        """
        path = directory / "ledger.sqlite"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.exists():
                path.touch(mode=0o600)
                with _connection(path) as connection:
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute("INSERT INTO meta VALUES (?)", (_FORMAT,))
        except (OSError, sqlite3.Error) as error:
            path.unlink(missing_ok=True)
            raise LedgerError(f"cannot begin the ledger {path}: {error}") from error
        return cls(directory, epsilon=epsilon, delta=delta)

    def history(self) -> tuple[GaussianSteps, ...]:
        """Everything the data was used for, over all runs, equal mechanisms added up."""
        with self._transaction() as connection:
            return _history(connection)

    def releases(self, run_id: str) -> tuple[Release, ...]:
        """The releases to one run, by round."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT round_index, noise_multiplier, sampling_rate, steps, noise_is_private FROM releases "
                "WHERE run_id = ? ORDER BY round_index",
                (run_id,),
            ).fetchall()
        return tuple(Release(row[0], GaussianSteps(*row[1:4]), bool(row[4])) for row in rows)

    def pending(self, run_id: str, round_index: int) -> npt.NDArray[np.float64] | None:
        """The update already released for a round that is not over yet, or None if there is none.

        Raises:
            AlreadyReleased: the round is over; its update is gone and must not be made again.
        """
        with self._transaction() as connection:
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

    def check(self, request: GaussianSteps) -> None:
        """Decline work that would pass the budget.

        Raises:
            BudgetExceeded: with the epsilon that would be reached and the budget.
        """
        with self._transaction() as connection:
            self._check(connection, request)

    def release(
        self,
        run_id: str,
        round_index: int,
        spent: GaussianSteps,
        update: npt.NDArray[np.float64],
        *,
        noise_is_private: bool,
    ) -> None:
        """Count a release and keep its update until the round is over; on disk when this returns.

        The budget is checked in the same transaction, so that two processes cannot both spend the rest of it.

        Raises:
            BudgetExceeded: the budget would be passed; nothing is counted and nothing may leave.
            AlreadyReleased: this round already has a release.
        """
        content = np.ascontiguousarray(update, dtype="<f8").tobytes()
        row = (run_id, round_index, spent.noise_multiplier, spent.sampling_rate, spent.steps, noise_is_private, content)
        with self._transaction() as connection:
            self._check(connection, spent)
            self._insert(connection, "releases", row, f"round {round_index} of run {run_id} already has a release")

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

    def begin_session(self, run_id: str, round_index: int, attempt: int) -> None:
        """Note that the client joins an attempt of a round.

        Raises:
            AlreadyReleased: it has joined this attempt before, or has helped to open the round.
        """
        with self._transaction() as connection:
            self._refuse_opened(connection, run_id, round_index)
            again = f"attempt {attempt} of round {round_index} was joined before"
            self._insert(connection, "sessions", (run_id, round_index, attempt), again)

    def open_round(self, run_id: str, round_index: int) -> None:
        """Note, before they leave, that the client reveals the shares that open a round's sum.

        Raises:
            AlreadyReleased: it has done so before.
        """
        with self._transaction() as connection:
            self._refuse_opened(connection, run_id, round_index)
            self._insert(connection, "opened", (run_id, round_index), "the round was opened before")

    @staticmethod
    def _refuse_opened(connection: sqlite3.Connection, run_id: str, round_index: int) -> None:
        query = "SELECT 1 FROM opened WHERE run_id = ? AND round_index = ?"
        if connection.execute(query, (run_id, round_index)).fetchone():
            raise AlreadyReleased(
                f"this client has helped to open round {round_index} already; a second sum over the same updates would "
                "give single updates away",
                hint="the round counts as lost; go on with the next one",
            )

    @staticmethod
    def _insert(connection: sqlite3.Connection, table: str, row: tuple[object, ...], refusal: str) -> None:
        places = ", ".join("?" * len(row))
        try:
            connection.execute(f"INSERT INTO {table} VALUES ({places})", row)  # noqa: S608 (names of our own tables)
        except sqlite3.IntegrityError:
            raise AlreadyReleased(refusal) from None

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
            with _connection(self._path) as connection:
                yield connection
        except sqlite3.Error as error:
            raise LedgerError(
                f"the client's ledger {self._path} cannot be used: {error}",
                hint="nothing was sent; restore the file: without it a client cannot know what it has spent",
            ) from error


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction, committed to disk when the block ends without an exception. Never creates the file."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            yield connection
    finally:
        connection.close()


def _history(connection: sqlite3.Connection) -> tuple[GaussianSteps, ...]:
    rows = connection.execute("SELECT noise_multiplier, sampling_rate, steps FROM releases").fetchall()
    return merge(tuple(GaussianSteps(*row) for row in rows))
