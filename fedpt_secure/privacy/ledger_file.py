"""The file under a ledger: an SQLite database whose rows are chained, so that none can go missing or change unseen.

Every row of every table has a number, and `meta` holds how many there are and the head of a SHA-256 chain over all of
them in order. A row that was changed, removed, put in or moved breaks the chain, as does a file that was cut short.

The chain has no key: it finds damage, careless edits and a table restored on its own. It cannot find an owner who
recomputes it, nor an older copy of the whole file put in its place; the file is its owner's own, who would deceive
nobody else.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import AlreadyReleased, LedgerError

NAME = "ledger.sqlite"
FORMAT = "fedpt-secure ledger 2"
_OLDER = ("fedpt-secure ledger 1",)
_FAMILY = "fedpt-secure ledger "

_COLUMNS = {
    "budgets": ("epsilon", "delta", "unit", "set_at", "set_by"),
    "releases": (
        "run_id",
        "round_index",
        "noise_multiplier",
        "sampling_rate",
        "steps",
        "mode",
        "noise_is_private",
    ),
    "sessions": ("run_id", "round_index", "attempt"),
    "opened": ("run_id", "round_index"),
}
"""What is chained: every column but `releases.pending`, which is emptied when a round is over."""
_SCHEMA = (
    "CREATE TABLE meta (format TEXT NOT NULL, entries INTEGER NOT NULL, head BLOB NOT NULL) STRICT",
    """CREATE TABLE budgets (
        entry            INTEGER PRIMARY KEY,
        epsilon          REAL    NOT NULL,
        delta            REAL    NOT NULL,
        unit             TEXT    NOT NULL,
        set_at           TEXT    NOT NULL,
        set_by           TEXT    NOT NULL
    ) STRICT""",
    """CREATE TABLE releases (
        entry            INTEGER PRIMARY KEY,
        run_id           TEXT    NOT NULL,
        round_index      INTEGER NOT NULL,
        noise_multiplier REAL    NOT NULL,
        sampling_rate    REAL    NOT NULL,
        steps            INTEGER NOT NULL,
        mode             TEXT    NOT NULL,
        noise_is_private INTEGER NOT NULL,
        pending          BLOB,
        UNIQUE (run_id, round_index)
    ) STRICT""",
    """CREATE TABLE sessions (
        entry INTEGER PRIMARY KEY, run_id TEXT NOT NULL, round_index INTEGER NOT NULL, attempt INTEGER NOT NULL,
        UNIQUE (run_id, round_index, attempt)
    ) STRICT""",
    """CREATE TABLE opened (
        entry INTEGER PRIMARY KEY, run_id TEXT NOT NULL, round_index INTEGER NOT NULL, UNIQUE (run_id, round_index)
    ) STRICT""",
)

Row = Sequence[str | int | float]


@dataclass(frozen=True, slots=True)
class _Chain:
    """The chain after `entries` rows."""

    entries: int
    head: bytes

    def then(self, table: str, row: Row) -> _Chain:
        content = json.dumps([self.entries, table, *row], ensure_ascii=True, separators=(",", ":")).encode()
        return _Chain(self.entries + 1, hashlib.sha256(self.head + content).digest())


_START = _Chain(0, hashlib.sha256(FORMAT.encode()).digest())


class LedgerFile:
    """Transactions on one ledger file that is there already.

    Raises:
        LedgerError: there is none, or it is damaged, of another program, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _START
        with self.transaction() as connection:
            damage = connection.execute("PRAGMA quick_check(1)").fetchall()
            if damage != [("ok",)]:
                raise self._damaged(str(damage[0][0]))
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            if path.stat().st_size != pages * page_bytes:
                raise self._damaged("the file was cut short")

    @classmethod
    def create(cls, path: Path, *, budget: Row) -> None:
        """Begin a ledger with its first budget; one that is there already is left as it is.

        The file appears whole or not at all, with access for its owner only. Its content is on disk when this returns;
        its name, once `sync_names` was called.

        Raises:
            LedgerError: it cannot be written.
        """
        memory = sqlite3.connect(":memory:", isolation_level=None)
        try:
            for statement in _SCHEMA:
                memory.execute(statement)
            memory.execute("INSERT INTO meta VALUES (?, ?, ?)", (FORMAT, _START.entries, _START.head))
            append(memory, "budgets", budget, refusal="")
            content = memory.serialize()
        finally:
            memory.close()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.create_bytes(path, content, mode=0o600)
        except FileExistsError:
            return
        except OSError as error:
            raise LedgerError(f"cannot begin the ledger {path}: {error}") from error

    def sync_names(self) -> None:
        """Flush the names of the file and of its directory to disk; SQLite flushes what is in the file.

        Raises:
            LedgerError: the disk fails.
        """
        try:
            files.sync_directory(self.path.parent)
            files.sync_directory(self.path.parent.parent)
        except OSError as error:
            raise LedgerError(f"the client's ledger {self.path} cannot be flushed to disk: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, exclusive among processes, on disk when the block ends without an exception.

        Rows that were written since the last transaction are checked against the chain first.

        Raises:
            LedgerError: the file is missing or damaged, or the disk fails; nothing was changed.
        """
        try:
            with _connection(self.path) as connection:
                self._seen = self._verified(connection)
                yield connection
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error

    def _verified(self, connection: sqlite3.Connection) -> _Chain:
        found = connection.execute("SELECT * FROM meta").fetchall()
        if len(found) != 1 or found[0][0] != FORMAT:
            raise self._foreign(found)
        written = _Chain(*connection.execute("SELECT entries, head FROM meta").fetchone())
        rows: list[tuple[int, str, Row]] = []
        for table, columns in _COLUMNS.items():
            query = f"SELECT entry, {', '.join(columns)} FROM {table} WHERE entry >= ?"  # noqa: S608 (our own names)
            rows += [(row[0], table, row[1:]) for row in connection.execute(query, (self._seen.entries,))]
        chain = self._seen
        for entry, table, row in sorted(rows, key=lambda item: item[0]):
            if entry != chain.entries:
                raise self._damaged(f"entry {chain.entries} is missing or stands twice")
            chain = chain.then(table, row)
        if chain != written:
            raise self._damaged("its entries do not fit their chain: something was changed, removed or put in")
        return chain

    def _foreign(self, meta: list[tuple[object, ...]]) -> LedgerError:
        given = str(meta[0][0]) if meta else ""
        if given in _OLDER:
            return LedgerError(
                f"{self.path} was written by an earlier version of this program ({given}; this one writes {FORMAT}), "
                "which kept no budget in it",
                hint="note what it has spent, keep the file elsewhere, and begin a new one with a budget smaller by "
                "that: `fedpt-secure ledger set-budget DIR --create --epsilon E`",
            )
        if given.startswith(_FAMILY):
            return LedgerError(
                f"{self.path} was written by a later version of this program ({given}; this one reads {FORMAT})",
                hint="upgrade fedpt-secure; a ledger is never converted back",
            )
        return LedgerError(f"{self.path} is not a ledger of this program")

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(
            f"the client's ledger {self.path} cannot be used: {reason}",
            hint="nothing was sent; restore the file: without it a client cannot know what it has spent",
        )


def append(connection: sqlite3.Connection, table: str, row: Row, *, refusal: str, pending: bytes | None = None) -> None:
    """Add a row to a table and to the chain.

    Args:
        row: values of the table's columns, in the types of the schema.
        refusal: message of the error where the row's key is there already.
        pending: of a release only: the update, outside the chain.

    Raises:
        AlreadyReleased: a row of the same key is there.
    """
    chain = _Chain(*connection.execute("SELECT entries, head FROM meta").fetchone())
    columns: list[str] = ["entry", *_COLUMNS[table]]
    values: list[str | int | float | bytes] = [chain.entries, *row]
    if pending is not None:
        columns.append("pending")
        values.append(pending)
    places = ", ".join("?" * len(values))
    try:
        connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", values)  # noqa: S608 (ours)
    except sqlite3.IntegrityError:
        raise AlreadyReleased(refusal) from None
    after = chain.then(table, row)
    connection.execute("UPDATE meta SET entries = ?, head = ?", (after.entries, after.head))


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction, committed to disk when the block ends without an exception. Never creates the file."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30)
    try:
        # In the default mode, DELETE, a power cut just after the commit can bring the journal back and undo it:
        # unlinking is not flushed. Truncating is, at synchronous = FULL.
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            yield connection
    finally:
        connection.close()
