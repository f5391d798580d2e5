"""The queue: which item an annotator is asked next, and on which side each answer stands.

Nothing here is left to a clock or a generator: order, sides, gold items and repeats follow from hashes of (seed, item,
annotator), so the same people meet the same questions again. Time decides only when a lease has run out.

Everybody works through the queue in the same blocks, so that items wanted by two people get both labels soon, but
within a block in an order of their own, so that what tires one person is fresh to the next.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tether.errors import StoreError, did_you_mean
from tether.feedback.records import Added, Answer, Item, Task, iso_time
from tether.feedback.schema import GOLD, MAIN, REPEAT, to_json

BLOCK = 64  # neighbors in the queue whose order is each annotator's own
REPEAT_AFTER = 10  # items judged in between, at least: less, and the person remembers
REPEAT_SPREAD = 20  # up to so many more

_IDS = 2**31 - 1  # numbers that items may have, from 1

_CURSOR = {MAIN: "cursor", GOLD: "gold_cursor"}


@dataclass(frozen=True, slots=True)
class Mix:
    """What the store was made with."""

    seed: int
    gold_fraction: float  # of the tasks
    repeat_fraction: float  # of an annotator's own pairs
    lease_s: float  # seconds that an item is one annotator's


def draw(*parts: object) -> int:
    """64 bits that follow from `parts` alone."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def chance(*parts: object) -> float:
    """A number in [0, 1) that follows from `parts` alone."""
    return (draw(*parts) >> 11) / 2**53


def display_order(seed: int, fingerprint: str, annotator: str, answers: int) -> tuple[int, ...]:
    """Stored indices from left to right."""
    return tuple(sorted(range(answers), key=lambda i: draw(seed, "side", fingerprint, annotator, i)))


def person_of(connection: sqlite3.Connection, name: str) -> sqlite3.Row:
    """An annotator's row; StoreError for a name that was never registered."""
    row: sqlite3.Row | None = connection.execute("SELECT * FROM annotators WHERE name = ?", (name,)).fetchone()
    if row is None:
        names = [r["name"] for r in connection.execute("SELECT name FROM annotators LIMIT 1000")]
        raise StoreError(
            f"nobody named {name[:60]!r} labels here.{did_you_mean(name, names)} Register the name first: "
            "tether label --annotator NAME."
        )
    return row


# ---------------------------------------------------------------- adding


def add_items(
    connection: sqlite3.Connection, items: Iterable[Item], *, overlap: float, seed: int, first: bool = False
) -> Added:
    """Queue what is not there yet, behind what is; `first`: before it, and so what waits already."""
    order = [(fingerprint(item), item) for item in items]
    new: dict[str, Item] = {}
    waits: dict[str, Item] = {}
    ids: dict[str, int] = {}
    for mark, item in order:
        if row := row_of(connection, mark):
            ids[mark] = row["id"]
            if first and row["pool"] == MAIN and row["needs"]:
                waits[mark] = item
        else:
            new.setdefault(mark, item)
    twice: set[str] = set()
    for pool in (MAIN, GOLD):
        batch = sorted(
            (mark for mark, item in new.items() if (item.gold is not None) == (pool == GOLD)),
            key=lambda mark: draw(seed, "queue", mark),
        )
        if not batch:
            continue
        if pool == MAIN:
            twice = _chosen(batch, overlap, seed)
        start = _start(connection, pool, len(batch), first=first)
        ids |= _insert(connection, pool, [(mark, new[mark]) for mark in batch], twice, start=start, seed=seed)
    if waits:
        _move_first(connection, waits, seed)
    golds = sum(item.gold is not None for item in new.values())
    wanted = len(new) - golds + len(twice)
    connection.execute(
        "UPDATE totals SET items = items + ?, gold = gold + ?, wanted = wanted + ?, remaining = remaining + ?",
        (len(new) - golds, golds, wanted, wanted),
    )
    return Added(tuple(ids[mark] for mark, _ in order), len(new), len(order) - len(new), len(twice))


def fingerprint(item: Item) -> str:
    """Equal for items that ask the same: same prompt, same answers in the same order."""
    return blake2b(to_json([item.prompt, [a.text for a in item.answers]]).encode(), digest_size=16).hexdigest()


def labels_wanted(connection: sqlite3.Connection, item: Item) -> int | None:
    """How many labels of people an item still waits for; None where it is not in the store. Of gold: 0."""
    row = row_of(connection, fingerprint(item))
    return None if row is None else int(row["needs"]) * (row["pool"] == MAIN)


def row_of(connection: sqlite3.Connection, mark: str) -> sqlite3.Row | None:
    """id, pool and needs of the item with a fingerprint; None where there is none. Repeats are not looked at."""
    found: sqlite3.Row | None = connection.execute(
        "SELECT id, pool, needs FROM items WHERE fingerprint = ? AND repeat_of IS NULL", (mark,)
    ).fetchone()
    return found


def _move_first(connection: sqlite3.Connection, waits: dict[str, Item], seed: int) -> None:
    """Put items that wait before everything else; what their new source says is added to what is known of them."""
    marks = sorted(waits, key=lambda mark: draw(seed, "queue", mark))
    for position, mark in enumerate(marks, _start(connection, MAIN, len(marks), first=True)):
        connection.execute(
            "UPDATE items SET position = ?, source = json_patch(coalesce(source, '{}'), ?) WHERE fingerprint = ? AND "
            "repeat_of IS NULL",
            (position, to_json(waits[mark].source or {}), mark),
        )


def _chosen(batch: Sequence[str], fraction: float, seed: int) -> set[str]:
    """`fraction` of the batch; what is left of a whole item is drawn, so items added one by one have their share."""
    exact = fraction * len(batch)
    count = int(exact)
    if chance(seed, "overlap", batch[0]) < exact - count:
        count += 1
    return set(sorted(batch, key=lambda mark: draw(seed, "twice", mark))[:count])


def _start(connection: sqlite3.Connection, pool: int, count: int, *, first: bool) -> int:
    """Where `count` items begin: behind everything, or before it, where everybody looks next."""
    if not first:  # positions count from 0, those put first from -1 down
        totals = connection.execute("SELECT items, gold FROM totals").fetchone()
        return int(totals["gold" if pool == GOLD else "items"])
    (least,) = connection.execute("SELECT min(position) FROM items WHERE pool = ?", (pool,)).fetchone()
    position: int = min(least or 0, 0) - count
    column = _CURSOR[pool]
    connection.execute(f"UPDATE annotators SET {column} = min({column}, ?)", (position,))
    return position


def _new_id(connection: sqlite3.Connection, *about: object) -> int:
    """A number that says nothing: counted ones would tell people which items are gold, and which are repeats."""
    attempt, number = 0, 0
    while not number or connection.execute("SELECT 1 FROM items WHERE id = ?", (number,)).fetchone():
        attempt, number = attempt + 1, 1 + draw("id", *about, attempt) % _IDS
    return number


def _insert(
    connection: sqlite3.Connection, pool: int, batch: Sequence[tuple[str, Item]], twice: set[str],
    *, start: int, seed: int,
) -> dict[str, int]:  # fmt: skip
    ids = {}
    for position, (mark, item) in enumerate(batch, start):
        target = None if pool == GOLD else 2 if mark in twice else 1
        ids[mark] = _new_id(connection, seed, mark)
        connection.execute(
            "INSERT INTO items (id, pool, position, needs, target, kind, fingerprint, longer, gold, grp, source, "
            "prompt, answers) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                ids[mark], pool, position, target or 1, target, item.kind, mark, _longer(item), item.gold, item.group,
                None if item.source is None else to_json(item.source), to_json(item.prompt),
                to_json([_stored(answer) for answer in item.answers]),
            ),
        )  # fmt: skip
    return ids


def _stored(answer: Answer) -> dict[str, Any]:
    """An answer as the table holds it: what is not said is as usual."""
    source = {"source": answer.source} if answer.source else {}
    reason = {} if answer.finish_reason == "stop" else {"finish_reason": answer.finish_reason}
    return {"text": answer.text} | source | reason


def _longer(item: Item) -> int | None:
    lengths = [len(answer.text) for answer in item.answers]
    return lengths.index(max(lengths)) if lengths.count(max(lengths)) == 1 else None


# ---------------------------------------------------------------- asking


def held_task(connection: sqlite3.Connection, annotator: str, now: float, mix: Mix) -> Task | None:
    """The task that the annotator holds and that needs no writing to hand out again."""
    person = person_of(connection, annotator)
    lease = connection.execute("SELECT * FROM leases WHERE annotator = ?", (person["id"],)).fetchone()
    if lease is None or lease["expires"] - now < mix.lease_s / 2 or lease["guideline"] != guideline_now(connection):
        return None
    return _task(connection, person, lease)


def next_task(connection: sqlite3.Connection, annotator: str, now: float, mix: Mix) -> Task | None:
    """Lease the annotator an item; None if nothing is left for them, for now."""
    person = person_of(connection, annotator)
    lease = connection.execute("SELECT * FROM leases WHERE annotator = ?", (person["id"],)).fetchone()
    item: int | None
    if lease is not None and (lease["expires"] > now or may_take(connection, lease["item"], person["id"], now)):
        item = lease["item"]
    else:
        item = _choose(connection, person, now, mix)
    if item is None:
        connection.execute("DELETE FROM leases WHERE annotator = ?", (person["id"],))
        return None
    return _task(connection, person, take_lease(connection, person, item, now, mix))


def may_take(connection: sqlite3.Connection, item: int, person: int, now: float) -> bool:
    """Whether the item still needs a label that nobody else is about to give."""
    row = connection.execute("SELECT pool, needs FROM items WHERE id = ?", (item,)).fetchone()
    (others,) = connection.execute(
        "SELECT count(*) FROM leases WHERE item = ? AND annotator != ? AND expires > ?", (item, person, now)
    ).fetchone()
    return bool(row["pool"] != MAIN or row["needs"] > others)


def take_lease(connection: sqlite3.Connection, person: sqlite3.Row, item: int, now: float, mix: Mix) -> sqlite3.Row:
    """Make the item this annotator's for a while, in place of what they held."""
    row = connection.execute("SELECT fingerprint, answers, repeat_of FROM items WHERE id = ?", (item,)).fetchone()
    order = display_order(mix.seed, row["fingerprint"], person["name"], len(json.loads(row["answers"])))
    shown = to_json(order[::-1] if row["repeat_of"] is not None else order)  # a repeat: sides exchanged
    connection.execute(
        "INSERT OR REPLACE INTO leases (annotator, item, expires, shown, guideline) VALUES (?, ?, ?, ?, ?)",
        (person["id"], item, now + mix.lease_s, shown, guideline_now(connection)),
    )
    lease: sqlite3.Row = connection.execute("SELECT * FROM leases WHERE annotator = ?", (person["id"],)).fetchone()
    return lease


def guideline_now(connection: sqlite3.Connection) -> int | None:
    """The version in force."""
    version: int | None = connection.execute("SELECT max(version) FROM guidelines").fetchone()[0]
    return version


def _choose(connection: sqlite3.Connection, person: sqlite3.Row, now: float, mix: Mix) -> int | None:
    """A repeat that is due, else gold where the seed says so, else what is next in the queue."""
    done = person["labels"] + person["skips"]
    due = connection.execute(
        "SELECT item, shown_as FROM repeats WHERE annotator = ? AND done = 0 AND due <= ? ORDER BY due, item LIMIT 1",
        (person["id"], done),
    ).fetchone()
    if due is not None:
        return due["shown_as"] or _make_repeat(connection, person["id"], due["item"], mix.seed)
    if chance(mix.seed, "gold", person["name"], done) < mix.gold_fraction:
        item = _next_in(connection, GOLD, person, now, mix.seed)
        if item is not None:
            return item
    item = _next_in(connection, MAIN, person, now, mix.seed)
    if item is None and not connection.execute("SELECT items FROM totals").fetchone()[0]:
        return _next_in(connection, GOLD, person, now, mix.seed)  # nothing but gold: a trial for newcomers
    return item


def _next_in(connection: sqlite3.Connection, pool: int, person: sqlite3.Row, now: float, seed: int) -> int | None:
    """The first item of a pool that this annotator has not judged and nobody is about to complete."""
    column = _CURSOR[pool]
    at: int = person[column]
    first = None
    while True:
        rows = connection.execute(
            "SELECT id, position, fingerprint, needs > (SELECT count(*) FROM leases WHERE leases.item = items.id "
            "AND expires > ? AND leases.annotator != ?) AS free FROM items INDEXED BY items_queue WHERE pool = ? "
            "AND needs > 0 AND position >= ? AND NOT EXISTS (SELECT 1 FROM standing WHERE standing.item = items.id "
            "AND standing.annotator = ?) ORDER BY position LIMIT ?",
            (now, person["id"], pool, at, person["id"], BLOCK),
        ).fetchall()
        if rows and first is None:
            first = rows[0]["position"]
            if first > person[column]:  # whoever comes back starts here, and scans what lies before it never again
                connection.execute(f"UPDATE annotators SET {column} = ? WHERE id = ?", (first, person["id"]))
        free = [row for row in rows if pool == GOLD or row["free"]]
        if free:
            own = draw(seed, "order", person["name"]) | 1  # odd: multiplying by it shuffles, and costs next to nothing
            best = min(free, key=lambda r: (r["position"] // BLOCK, int(r["fingerprint"][:16], 16) * own % 2**64))
            chosen: int = best["id"]
            return chosen
        if len(rows) < BLOCK:
            return None
        at = rows[-1]["position"] + 1


def _make_repeat(connection: sqlite3.Connection, person: int, item: int, seed: int) -> int:
    """Copy an item that this annotator has judged, to be judged again."""
    copy = _new_id(connection, seed, "repeat", person, item)
    connection.execute(
        "INSERT INTO items (id, pool, position, needs, target, kind, fingerprint, longer, repeat_of, grp, source, "
        "prompt, answers) SELECT ?, ?, 0, 1, 1, kind, fingerprint, longer, id, grp, source, prompt, answers FROM items "
        "WHERE id = ?",
        (copy, REPEAT, item),
    )
    connection.execute("UPDATE repeats SET shown_as = ? WHERE annotator = ? AND item = ?", (copy, person, item))
    return copy


def _task(connection: sqlite3.Connection, person: sqlite3.Row, lease: sqlite3.Row) -> Task:
    row = connection.execute("SELECT kind, prompt, answers FROM items WHERE id = ?", (lease["item"],)).fetchone()
    answers: list[dict[str, Any]] = json.loads(row["answers"])
    order = tuple(json.loads(lease["shown"]))
    return Task(
        item=lease["item"],
        annotator=person["name"],
        kind=row["kind"],
        prompt=json.loads(row["prompt"]),
        answers=tuple(answers[i]["text"] for i in order),
        order=order,
        guideline=lease["guideline"],
        expires=iso_time(lease["expires"]),
        number=person["labels"] + person["skips"] + 1,
    )
