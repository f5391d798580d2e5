"""The file behind the store: its tables, its connections, and what can go wrong with it.

SQLite in WAL mode with synchronous=FULL: a commit is on the disk before it is acknowledged, so neither kill -9 nor a
power failure takes back what somebody was told is saved; leases alone do without the wait (NORMAL). One writer at a
time (BEGIN IMMEDIATE), any number of readers.

`events` is the truth, append-only by trigger. `standing`, `items.needs`, `repeats` and the counters follow from it, are
written in the same transaction, and are there so that no page ever has to count a million rows.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tether.errors import StoreError, did_you_mean_path, first_line

SCHEMA = 2  # 2: verdicts
APPLICATION = 0x54455448  # "TETH": tells our file from anybody else's SQLite
MAGIC = b"SQLite format 3\x00"  # how every such file begins

MAIN, GOLD, REPEAT = 0, 1, 2  # items.pool

_TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE guidelines (version INTEGER PRIMARY KEY, text TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    at TEXT NOT NULL,
    labels INTEGER NOT NULL DEFAULT 0,       -- that stand
    skips INTEGER NOT NULL DEFAULT 0,
    cursor INTEGER NOT NULL,                 -- before this position nothing in the queue is left for them
    gold_cursor INTEGER NOT NULL
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    pool INTEGER NOT NULL,
    position INTEGER NOT NULL,               -- place in its pool's queue
    needs INTEGER NOT NULL,                  -- labels still wanted; gold: always 1, everybody is asked
    target INTEGER,                          -- labels wanted; gold: null
    kind TEXT NOT NULL CHECK (kind IN ('pair', 'rank')),
    fingerprint TEXT NOT NULL,               -- of prompt and answers
    longer INTEGER,                          -- index of the longest answer, null where two are as long
    gold INTEGER,
    repeat_of INTEGER REFERENCES items (id),
    grp TEXT,
    source TEXT,                             -- JSON, like prompt and answers
    prompt TEXT NOT NULL,
    answers TEXT NOT NULL
);
CREATE UNIQUE INDEX items_once ON items (fingerprint) WHERE repeat_of IS NULL;
CREATE INDEX items_queue ON items (pool, position) WHERE needs > 0;
CREATE INDEX items_place ON items (pool, position);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('label', 'undo')),
    annotator INTEGER NOT NULL REFERENCES annotators (id),
    item INTEGER NOT NULL REFERENCES items (id),
    key TEXT NOT NULL,
    at TEXT NOT NULL,
    guideline INTEGER REFERENCES guidelines (version),
    choice TEXT,
    ranking TEXT,
    strength INTEGER,
    axes TEXT,
    note TEXT,
    reason TEXT,
    shown TEXT,
    seconds REAL,
    undoes INTEGER REFERENCES events (id),
    UNIQUE (annotator, key)                  -- each annotator's own: a key says nothing about what others did
);
CREATE UNIQUE INDEX events_undoes ON events (undoes) WHERE undoes IS NOT NULL;
CREATE INDEX events_at ON events (at);
CREATE INDEX events_guideline ON events (guideline, id);
CREATE TRIGGER events_do_not_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_do_not_go BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TABLE standing (
    event INTEGER PRIMARY KEY REFERENCES events (id),
    item INTEGER NOT NULL REFERENCES items (id),
    annotator INTEGER NOT NULL REFERENCES annotators (id),
    decided INTEGER NOT NULL,                -- 0: a skip
    UNIQUE (item, annotator)
);
CREATE INDEX standing_of ON standing (annotator, event);
CREATE TABLE leases (
    annotator INTEGER PRIMARY KEY REFERENCES annotators (id),
    item INTEGER NOT NULL REFERENCES items (id),
    expires REAL NOT NULL,                   -- seconds since 1970
    shown TEXT NOT NULL,
    guideline INTEGER REFERENCES guidelines (version)
);
CREATE INDEX leases_on ON leases (item);
CREATE TABLE repeats (
    annotator INTEGER NOT NULL REFERENCES annotators (id),
    item INTEGER NOT NULL REFERENCES items (id),
    due INTEGER NOT NULL,                    -- how many items the annotator has judged by then
    shown_as INTEGER REFERENCES items (id),  -- the repeat, once it was needed
    done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (annotator, item)
) WITHOUT ROWID;
CREATE INDEX repeats_due ON repeats (annotator, due) WHERE done = 0;
CREATE INDEX repeats_as ON repeats (shown_as);
CREATE TABLE totals (
    items INTEGER NOT NULL,                  -- without gold and repeats
    gold INTEGER NOT NULL,
    wanted INTEGER NOT NULL,                 -- labels that `items` need in all
    remaining INTEGER NOT NULL
);
INSERT INTO totals VALUES (0, 0, 0, 0);
"""

_VERDICTS = """
CREATE TABLE verdicts (                      -- what a judge's label has beside a person's
    event INTEGER PRIMARY KEY REFERENCES events (id),
    probability REAL NOT NULL,               -- that answer 0 is better
    principle TEXT NOT NULL,
    answers TEXT NOT NULL                    -- JSON: of each order the probability, and what the model wrote
);
CREATE TABLE judges (name TEXT PRIMARY KEY, made_of TEXT NOT NULL) WITHOUT ROWID;  -- JSON: what its labels depend on
"""


def is_store(path: Path) -> bool:
    """Whether the file is SQLite; whether it is ours, opening it says."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class Database:
    """Connections to one file: one a thread for short work, one of its own for a long read."""

    def __init__(self, path: Path, *, create: bool, busy_s: float, upgrade: bool = True):
        """upgrade: bring a file of an older schema up to date; without it nothing is written, and what is new in this
        schema is not there to be read."""
        self.path, self._busy_s = path, busy_s
        self._local = threading.local()
        self._open: dict[threading.Thread, sqlite3.Connection] = {}
        self._opening = threading.Lock()
        self._writer = threading.Lock()  # threads take turns here: SQLite's own waiting sleeps and is not fair
        if not create and not path.exists():
            raise StoreError(
                f"{path} does not exist, so there are no labels to read.{did_you_mean_path(str(path))} Check the path, "
                "or make a store: tether label --from pairs.jsonl --to preferences.db."
            )
        with self._wrap_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connection()
            self._check_ours(connection)
            version = _pragma(connection, "user_version")
            if not upgrade and version == 0:
                raise StoreError(f"{path} is empty: it holds no labels and nothing to label. Check the path.")
            if version == 0:
                connection.execute("PRAGMA journal_mode = WAL")  # stays so, in the file
            if upgrade and version < SCHEMA:
                self._make_tables()

    def _make_tables(self) -> None:
        with self.write() as connection:
            version = _pragma(connection, "user_version")
            if version == SCHEMA:
                return  # another process was faster
            if version:
                self._check_no_judges(connection)
            for statement in _statements(_VERDICTS if version else _TABLES + _VERDICTS):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def _check_no_judges(self, connection: sqlite3.Connection) -> None:
        """StoreError where a person of a store from before there were judges is called like one."""
        found = connection.execute("SELECT name FROM annotators WHERE name GLOB 'judge:*' LIMIT 1").fetchone()
        if found:
            raise StoreError(
                f"{self.path} holds labels of somebody called {found['name']!r}, which is how models that judge are "
                "called now: they would be taken for a model's, and leave what is trained on people's labels. Nothing "
                "was changed. Rename the person in the table `annotators` of that SQLite file, then try again."
            )

    def _check_ours(self, connection: sqlite3.Connection) -> None:
        """StoreError for another program's file, or a newer tether's."""
        version = _pragma(connection, "user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and _pragma(connection, "application_id") != APPLICATION:
            raise StoreError(
                f"{self.path} is a SQLite database of another program: labels would be written into it. Name another "
                "file."
            )
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} has schema {version}, and this version of tether knows schemas up to {SCHEMA}: it could "
                "damage what it does not understand. Install the tether that wrote it, or a newer one."
            )

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on the disk when the block has ended, or none of it.

        durable: False for what a power failure may take back, though never kill -9: its commit does not wait for the
        disk, the next durable one takes it along.
        """
        with self._wrap_errors(), self._writer:
            connection = self._connection()
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled back by itself
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One state of the store, whatever is written meanwhile; for work that ends within the block."""
        with self._wrap_errors():
            connection = self._connection()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")  # nothing was written

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Likewise, on a connection of its own: for generators, which may move between threads."""
        with self._wrap_errors():
            connection = self._connect()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                connection.close()

    def close(self) -> None:
        """Close every thread's connection; no thread may be at work."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()
        self._local = threading.local()

    def _connection(self) -> sqlite3.Connection:
        if getattr(self._local, "process", None) != os.getpid():  # SQLite must not be carried through a fork
            self._local.connection, self._local.process = self._connect(), os.getpid()
            with self._opening:
                for thread in [t for t in self._open if not t.is_alive()]:  # a server's threads come and go
                    self._open.pop(thread).close()
                self._open[threading.current_thread()] = self._local.connection
        connection: sqlite3.Connection = self._local.connection
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._busy_s, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    @contextmanager
    def _wrap_errors(self) -> Iterator[None]:
        """Turn what SQLite or the disk says into a StoreError that says what to do."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.InterfaceError):
            raise  # our own mistake
        except sqlite3.DatabaseError as error:
            raise StoreError(_what_failed(self.path, error, self._busy_s)) from error
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be opened ({error.strerror or error}): no label would be kept. Check path and "
                "permissions."
            ) from error


def _what_failed(path: Path, error: sqlite3.Error, busy_s: float) -> str:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return (
            f"{path} is locked: another program has been writing to it for {busy_s:g} s, and nothing was saved. Close "
            "what holds it (a database browser, a backup), then try again."
        )
    if name == "SQLITE_FULL":
        return f"{path}: the disk is full, and nothing was saved. Free some space, then try again."
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return (
            f"{path} is damaged or no store of labels ({error}): reading on could mix up labels. Restore it from a "
            "copy, or name another file."
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return (
            f"{path} cannot be opened for writing ({error}): no label would be kept. Check path and permissions, also "
            "of its folder."
        )
    return f"{path}: {first_line(error)}, and nothing was saved. Check the disk and its free space, then try again."


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit the transaction that it is to be part of."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def to_json(value: Any) -> str:
    """JSON that any SQLite can hold: half a character, which UTF-8 cannot, is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text
