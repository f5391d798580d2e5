"""rewards.db: what reward sources on other machines answered, so that a resumed run learns from the same.

A model on another machine may be random, or another one tomorrow. A run that was killed samples the same responses
again from its last checkpoint on; their scores are then taken from here, and not asked for a second time. So nothing is
cut back with the checkpoint: what came after it is what a resumed run looks for. An answer counts for the same request
alone, by its hash: other responses, such as a changed microbatch may lead to, are asked about.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tether.errors import RunError

NAME = "rewards.db"

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    phase TEXT NOT NULL,    -- cycle-000003, evaluation-000002
    source TEXT NOT NULL,   -- name of the reward source
    row INTEGER NOT NULL,   -- of the phase's responses, from 0
    request BLOB NOT NULL,  -- SHA-256 of what was asked
    score REAL,             -- NULL: the source had no answer
    PRIMARY KEY (phase, source, row)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """The file. Opened for each use: twice a cycle, and nothing to close when a run is killed."""

    path: Path

    def read(self, phase: str, source: str, requests: Sequence[bytes]) -> list[float | None] | None:
        """The answers to `requests`, one for each row; None where they are not all there."""
        if not self.path.exists():
            return None
        with self._open() as connection:
            kept = connection.execute(
                "SELECT request, score FROM answers WHERE phase = ? AND source = ? ORDER BY row", (phase, source)
            ).fetchall()
        return [score for _, score in kept] if [request for request, _ in kept] == list(requests) else None

    def write(self, phase: str, source: str, requests: Sequence[bytes], scores: Sequence[float | None]) -> None:
        """Keep them in place of what stood there; on the disk when this returns."""
        rows = [(phase, source, i, *pair) for i, pair in enumerate(zip(requests, scores, strict=True))]
        with self._open() as connection, connection:
            connection.execute("DELETE FROM answers WHERE phase = ? AND source = ?", (phase, source))
            connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=10)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(_TABLE)
                yield connection
        except sqlite3.DatabaseError as error:
            raise RunError(
                f"{self.path} cannot be used ({error}): answers of reward sources would be lost, and a resumed run "
                "would not be the same. Free some space, make it writable, or, if it is damaged, move it away: what it "
                "held is then asked for again."
            ) from error
