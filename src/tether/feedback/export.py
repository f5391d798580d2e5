"""The store as JSONL, for everybody else: preferences in the ecosystem's columns, and every event."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tether.errors import StoreError
from tether.feedback import reading
from tether.feedback.records import Exported, Filters


def export(connection: sqlite3.Connection, to: Path, filters: Filters) -> Exported:
    """Write each file whole or not at all; filters: of preferences.jsonl, events and items are all of them."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        return Exported(
            path=str(to),
            rows=_write(to / "preferences.jsonl", reading.preferences(connection, filters).rows),
            events=_write(to / "events.jsonl", reading.events(connection)),
            items=_write(to / "items.jsonl", map(asdict, reading.items(connection))),
        )
    except OSError as error:
        raise StoreError(
            f"the labels cannot be exported to {to} ({error.strerror or error}): the files there are the old ones, or "
            "none. Name a directory that is writable and has room."
        ) from error


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """JSONL, written beside and renamed; returns how many lines."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("wb") as file:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", "backslashreplace"))  # of half a character: \ud800, as JSON writes it
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
