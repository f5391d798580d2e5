"""Recording a judgment, and taking one back: each an event that is added, and what follows from it.

Both take a key that the client made up. A request that is sent again, because the answer got lost on the way, has the
same key: it finds the first event, changes nothing, and is answered as before.
"""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Any

from tether.errors import LabelError
from tether.feedback.queue import REPEAT_AFTER, REPEAT_SPREAD, Mix, chance, draw, may_take, person_of, take_lease
from tether.feedback.records import RANKING, Judgment, Receipt, Verdict, check_text, iso_time
from tether.feedback.schema import GOLD, MAIN, REPEAT, to_json

_LONGEST_KEY = 200  # characters


def record(
    connection: sqlite3.Connection, annotator: str, item: int, key: str, judgment: Judgment,
    *, on_screen: bool, seconds: float | None, now: float, mix: Mix,
) -> Receipt:  # fmt: skip
    """Add a label event for the item that the annotator holds.

    on_screen: the judgment numbers the answers by their place on the screen. It is checked as it was sent: an error
    about stored answers would tell the annotator the stored order, and so which answer of a gold item is the better.
    """
    person = person_of(connection, annotator)
    if earlier := _earlier(connection, person, key):
        if earlier["kind"] != "label" or earlier["item"] != item:
            raise _key_taken(key)
        columns = _columns(_checked(judgment, json.loads(earlier["shown"]), on_screen))
        if any(earlier[name] != value for name, value in columns.items()):
            raise _key_taken(key)
        return _receipt(earlier, annotator)
    lease = connection.execute("SELECT * FROM leases WHERE annotator = ?", (person["id"],)).fetchone()
    if lease is None or lease["item"] != item:
        raise LabelError(
            f"item {item} is not the one that {annotator} was given last: labels could be forged, or given twice. "
            "Nothing was recorded; ask for the next task."
        )
    row = connection.execute("SELECT * FROM items WHERE id = ?", (item,)).fetchone()
    judgment = _checked(judgment, json.loads(lease["shown"]), on_screen)
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise LabelError(f"seconds={seconds} is not a time that a person can have spent. Give a number from 0 on.")
    decided = judgment.choice != "skip"
    if decided and not may_take(connection, item, person["id"], now):
        raise LabelError(
            f"item {item} went to somebody else after {annotator}'s {mix.lease_s / 60:g} minutes: it would have more "
            "labels than it is to have. Nothing was recorded; ask for the next task."
        )
    at = _not_before_the_last(connection, now)
    event = _append(
        connection, kind="label", annotator=person["id"], item=item, key=key, at=at, guideline=lease["guideline"],
        shown=lease["shown"], seconds=seconds, **_columns(judgment),
    )  # fmt: skip
    connection.execute(
        "INSERT INTO standing (event, item, annotator, decided) VALUES (?, ?, ?, ?)",
        (event, item, person["id"], decided),
    )
    connection.execute("DELETE FROM leases WHERE annotator = ?", (person["id"],))
    _count(connection, person, row, decided=decided, by=1)
    if row["pool"] == REPEAT:
        connection.execute("UPDATE repeats SET done = 1 WHERE shown_as = ?", (item,))
    elif row["pool"] == MAIN and row["kind"] == "pair" and decided:
        _plan_repeat(connection, person, row, mix)
    return Receipt(event, "label", item, annotator, at)


def record_verdict(connection: sqlite3.Connection, judge: str, verdict: Verdict, *, now: float) -> int:
    """Add a judge's label; returns its event, or that of the label which stands already.

    People are asked all the same: the item needs as many labels of theirs as before.
    """
    person = person_of(connection, judge)
    standing = connection.execute(
        "SELECT event FROM standing WHERE item = ? AND annotator = ?", (verdict.item, person["id"])
    ).fetchone()
    if standing is not None:
        return int(standing["event"])
    (tried,) = connection.execute(  # by key, which has an index: over all labels of a judge this would be quadratic
        "SELECT count(*) FROM events WHERE annotator = ? AND key >= ? AND key < ?",
        (person["id"], f"{verdict.item}-", f"{verdict.item}."),
    ).fetchone()
    event = _append(
        connection, kind="label", annotator=person["id"], item=verdict.item, key=f"{verdict.item}-{tried}",
        at=_not_before_the_last(connection, now), choice=verdict.choice, shown=to_json(verdict.order),
    )  # fmt: skip
    connection.execute(
        "INSERT INTO standing (event, item, annotator, decided) VALUES (?, ?, ?, 1)",
        (event, verdict.item, person["id"]),
    )
    connection.execute(
        "INSERT INTO verdicts VALUES (?, ?, ?, ?)",
        (event, verdict.probability, verdict.principle, to_json(verdict.answers)),
    )
    connection.execute("UPDATE annotators SET labels = labels + 1 WHERE id = ?", (person["id"],))
    return event


def undo(connection: sqlite3.Connection, annotator: str, key: str, *, now: float, mix: Mix) -> Receipt | None:
    """See `Store.undo`. A skipped item that somebody else has would get more labels than it is to have."""
    person = person_of(connection, annotator)
    if earlier := _earlier(connection, person, key):
        if earlier["kind"] != "undo":
            raise _key_taken(key)
        return _receipt(earlier, annotator)
    last = connection.execute(
        "SELECT * FROM standing WHERE annotator = ? ORDER BY event DESC LIMIT 1", (person["id"],)
    ).fetchone()
    if last is None:
        return None
    row = connection.execute("SELECT * FROM items WHERE id = ?", (last["item"],)).fetchone()
    at = _not_before_the_last(connection, now)
    event = _append(
        connection, kind="undo", annotator=person["id"], item=row["id"], key=key, at=at, undoes=last["event"]
    )
    connection.execute("DELETE FROM standing WHERE event = ?", (last["event"],))
    _count(connection, person, row, decided=bool(last["decided"]), by=-1)
    _let_back(connection, person, row)
    if may_take(connection, row["id"], person["id"], now):  # a label's item always: it needs one more now
        take_lease(connection, person, row["id"], now, mix)
    return Receipt(event, "undo", row["id"], annotator, at)


def _checked(judgment: Judgment, order: list[int], on_screen: bool) -> Judgment:
    """The judgment in stored indices; LabelError where it cannot be made about these answers."""
    judgment.check(len(order))
    return judgment.as_stored(order) if on_screen else judgment


def _columns(judgment: Judgment) -> dict[str, Any]:
    """A judgment as the table holds it: equal columns for equal judgments."""
    return {
        "choice": judgment.choice,
        "ranking": to_json(judgment.ranking) if judgment.choice == RANKING else None,
        "strength": judgment.strength,
        "axes": to_json(dict(sorted(judgment.axes.items()))) if judgment.axes else None,
        "note": judgment.note or None,
        "reason": judgment.reason or None,
    }


def _earlier(connection: sqlite3.Connection, person: sqlite3.Row, key: str) -> sqlite3.Row | None:
    if not key:
        raise LabelError("the key is empty: a request sent twice would be recorded twice. Send a fresh one each time.")
    check_text("key", key, _LONGEST_KEY)
    found: sqlite3.Row | None = connection.execute(
        "SELECT * FROM events WHERE annotator = ? AND key = ?", (person["id"], key)
    ).fetchone()
    return found


def _key_taken(key: str) -> LabelError:
    return LabelError(
        f"the key {key[:60]!r} was used before, for something else: one of the two would be lost. Nothing was "
        "recorded; send a fresh key with each judgment."
    )


def _receipt(event: sqlite3.Row, annotator: str) -> Receipt:
    return Receipt(event["id"], event["kind"], event["item"], annotator, event["at"])


def _not_before_the_last(connection: sqlite3.Connection, now: float) -> str:
    """A time that does not go back, though a machine's clock may: the order of events is that of their times."""
    last = connection.execute("SELECT at FROM events ORDER BY id DESC LIMIT 1").fetchone()
    return max(iso_time(now), last["at"]) if last else iso_time(now)


def _append(connection: sqlite3.Connection, **columns: Any) -> int:
    marks = ", ".join("?" * len(columns))
    cursor = connection.execute(f"INSERT INTO events ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _count(connection: sqlite3.Connection, person: sqlite3.Row, item: sqlite3.Row, *, decided: bool, by: int) -> None:
    """Keep the counters: what a person has done, what an item still needs."""
    column = "labels" if decided else "skips"
    connection.execute(f"UPDATE annotators SET {column} = {column} + ? WHERE id = ?", (by, person["id"]))
    if item["pool"] == MAIN and decided:
        connection.execute("UPDATE items SET needs = needs - ? WHERE id = ?", (by, item["id"]))
        connection.execute("UPDATE totals SET remaining = remaining - ?", (by,))


def _plan_repeat(connection: sqlite3.Connection, person: sqlite3.Row, item: sqlite3.Row, mix: Mix) -> None:
    """Where the seed says so, this pair comes back to this person once they have forgotten it."""
    who = (mix.seed, item["fingerprint"], person["name"])
    if chance("repeat", *who) >= mix.repeat_fraction:
        return
    due = person["labels"] + person["skips"] + 1 + REPEAT_AFTER + draw("due", *who) % REPEAT_SPREAD
    connection.execute(
        "INSERT INTO repeats (annotator, item, due) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET due = excluded.due, "
        "done = 0",
        (person["id"], item["id"], due),
    )


def _let_back(connection: sqlite3.Connection, person: sqlite3.Row, item: sqlite3.Row) -> None:
    """The item can be chosen again, by everybody who had passed it."""
    if item["pool"] == REPEAT:
        connection.execute("UPDATE repeats SET done = 0 WHERE shown_as = ?", (item["id"],))
        return
    connection.execute(  # what is withdrawn cannot be repeated
        "UPDATE repeats SET done = 1 WHERE annotator = ? AND item = ?", (person["id"], item["id"])
    )
    if item["pool"] == GOLD:
        connection.execute(
            "UPDATE annotators SET gold_cursor = min(gold_cursor, ?) WHERE id = ?", (item["position"], person["id"])
        )
    else:
        connection.execute("UPDATE annotators SET cursor = min(cursor, ?)", (item["position"],))
