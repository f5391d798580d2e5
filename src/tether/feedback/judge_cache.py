"""What a model's answers cost and what they were: one SQLite file beside the store of a judge, or the rows of a
revision, which no kill takes anything from.

A request is reserved here before it is sent, and its answer is here before anything is made of it: so a budget is
never exceeded, and what was paid is not paid again. Errors, and answers that were filtered or cut, are never kept. One
process holds the file at a time; the lock goes with it, however it dies.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tether.errors import StoreError, first_line

_APPLICATION = 0x54454A43  # "TEJC"
_SCHEMA = 1
_SORTED = json.JSONEncoder(sort_keys=True)  # json.dumps would make one for every key
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS remembered (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO spent VALUES (1, 0, 0);
"""


def cache_path(store: str, judge: str) -> Path:
    """preferences.db and judge:NAME give preferences.judge-NAME.db; no two stores have one file."""
    path = Path(store)
    return path.with_name(f"{path.stem}.{judge.replace(':', '-', 1)}{path.suffix}")


def request_key(url: str, body: Mapping[str, Any], vote: int) -> str:
    """Equal for requests that ask the same; body: model, messages and parameters as they are sent."""
    return hashlib.sha256(_SORTED.encode([url, body, vote]).encode()).hexdigest()


class JudgeCache:
    """Answers by request, and what was spent; every method may be called from any thread, and is on the disk when it
    returns."""

    def __init__(self, path: Path, *, wait_s: float = 1.0) -> None:
        """wait_s: for whoever holds the file, before it is said to be in use."""
        self.path, self._turn = path, threading.Lock()
        with self._wrap_errors():
            self._connection = c = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
            application, version = (c.execute(f"PRAGMA {x}").fetchone()[0] for x in ("application_id", "user_version"))
            tables = c.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if (tables and application != _APPLICATION) or version > _SCHEMA:
                raise StoreError(
                    f"{path} is where answers are kept, and it is another program's file, or of a newer tether: it "
                    "would be damaged. Set judge.name to another name, or `to` of a revision to another file."
                )
            c.execute("PRAGMA locking_mode = EXCLUSIVE")
            c.execute("PRAGMA journal_mode = WAL")
            c.execute("PRAGMA synchronous = FULL")
            c.execute("BEGIN EXCLUSIVE")
            for statement in filter(str.strip, _TABLES.split(";")):
                c.execute(statement)
            c.execute(f"PRAGMA application_id = {_APPLICATION}")
            c.execute(f"PRAGMA user_version = {_SCHEMA}")
            c.execute("COMMIT")

    def close(self) -> None:
        with self._turn:
            self._connection.close()

    def answer(self, key: str) -> dict[str, Any] | None:
        """What was answered to a request; None where nothing was."""
        row = self._execute("SELECT reply FROM answers WHERE key = ?", key).fetchone()
        return json.loads(row[0]) if row else None

    def reserve(self, tokens: int, *, most_requests: int | None, most_tokens: int | None) -> bool:
        """Count a request that may take so many tokens; False, and nothing is counted, where it would pass a limit."""
        done = self._execute(
            "UPDATE spent SET requests = requests + 1, tokens = tokens + ?1 "
            "WHERE requests + 1 <= ifnull(?2, requests + 1) AND tokens + ?1 <= ifnull(?3, tokens + ?1)",
            tokens, most_requests, most_tokens,
        )  # fmt: skip
        return done.rowcount == 1

    def keep(self, key: str, reply: Mapping[str, Any], *, refund: int) -> None:
        """Keep an answer; refund: tokens that were reserved for it and not used."""
        with self._turn, self._wrap_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(reply)))
            self._connection.execute("UPDATE spent SET tokens = tokens - ?", (refund,))
            self._connection.execute("COMMIT")

    def refund(self, tokens: int) -> None:
        """Give back what was reserved for a request that was not answered, or not used by one that was."""
        self._execute("UPDATE spent SET tokens = tokens - ?", tokens)

    def spent(self) -> tuple[int, int]:
        """(requests, tokens) since the file was made."""
        requests, tokens = self._execute("SELECT requests, tokens FROM spent").fetchone()
        return requests, tokens

    def remember(self, name: str, value: str) -> None:
        self._execute("INSERT OR REPLACE INTO remembered VALUES (?, ?)", name, value)

    def remembered(self, name: str) -> str | None:
        row = self._execute("SELECT value FROM remembered WHERE name = ?", name).fetchone()
        return row[0] if row else None

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:  # no context manager: ten thousand answers are read in a second
            with self._turn:
                return self._connection.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    @contextmanager
    def _wrap_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.DatabaseError) -> StoreError:
        if not isinstance(error, sqlite3.OperationalError):
            return StoreError(
                f"{self.path} is damaged ({first_line(error)}): what was paid for cannot be read. Restore it from a "
                "copy, or remove it, and its answers are asked for again."
            )
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return StoreError(
                f"{self.path} is in use by another tether judge of the same name: both would pay "
                "for the same answers. Wait for it, or stop it."
            )
        return StoreError(
            f"{self.path}: {first_line(error)}: answers that are paid for could not be kept. Check the disk, its free "
            "space and the folder's permissions."
        )
