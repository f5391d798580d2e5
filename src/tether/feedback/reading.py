"""Reading the store: items, labels that stand, rows for a reward model, raw events.

What stands is asked for now, or as of an event: since events are only added, the labels that stood when event N was
the newest can always be read, however much has been labeled and taken back since.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from heapq import merge
from itertools import combinations, islice
from typing import Any

from tether.errors import StoreError
from tether.feedback.queue import guideline_now, person_of
from tether.feedback.records import (
    JUDGE,
    RANKING,
    TIES,
    Answer,
    Filters,
    Label,
    Preferences,
    StoredItem,
    time_bounds,
)

_LABEL = (
    "SELECT e.id AS event, e.item, a.name AS annotator, i.kind, e.choice, e.ranking, e.strength, e.axes, e.note, "
    'e.reason, e.shown AS "order", e.seconds, e.guideline, e.at, i.gold, i.repeat_of, i.longer, v.probability, '
    "(SELECT avg(value ->> 'probability') FROM json_each(v.answers)) AS first"
)
_PAIR = _LABEL + ", i.prompt, i.answers, i.grp"
_OF = " JOIN items i ON i.id = e.item JOIN annotators a ON a.id = e.annotator LEFT JOIN verdicts v ON v.event = e.id"
_NOW = f" FROM standing s CROSS JOIN events e ON e.id = s.event{_OF}"  # CROSS: in this order, which is the answer's
_THEN = f" FROM events e{_OF}"
_BY_A_JUDGE = f"a.name GLOB '{JUDGE}*'"


# ---------------------------------------------------------------- items


def items(connection: sqlite3.Connection, numbers: Sequence[int] | None = None) -> Iterator[StoredItem]:
    """In the order of their queues: what is labeled, gold, repeats; numbers: only these, in any order."""
    query = 'SELECT id, kind, prompt, answers, grp AS "group", gold, repeat_of, source, target, fingerprint FROM items'
    if numbers is None:
        rows = connection.execute(f"{query} ORDER BY pool, position, id")
    else:
        rows = connection.execute(f"{query} WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(numbers)),))
    for row in rows:
        source = None if row["source"] is None else json.loads(row["source"])
        parsed = {"prompt": json.loads(row["prompt"]), "answers": _answers(row), "source": source}
        yield StoredItem(**dict(row) | parsed)


def judge_queue(connection: sqlite3.Connection, judge: str) -> Iterator[tuple[int, str, bool]]:
    """(number, kind, labeled by this judge) of every item but repeats, gold ones too, in the order of their queues."""
    rows = connection.execute(
        "SELECT id, kind, EXISTS (SELECT 1 FROM standing s JOIN annotators a ON a.id = s.annotator WHERE s.item = "
        "items.id AND a.name = ?) AS labeled FROM items WHERE repeat_of IS NULL ORDER BY pool, position, id",
        (judge,),
    )
    for row in rows:
        yield row["id"], row["kind"], bool(row["labeled"])


def _answers(row: sqlite3.Row) -> tuple[Answer, ...]:
    return tuple(Answer(**answer) for answer in json.loads(row["answers"]))


# ---------------------------------------------------------------- labels


def labels(
    connection: sqlite3.Connection, filters: Filters, *, as_of: int | None = None, before: int | None = None,
    limit: int | None = None, newest_first: bool = False,
) -> Iterator[Label]:  # fmt: skip
    """Labels that stand, in the order in which they were given; before: only events below that number."""
    several = filters.annotators is not None and len(filters.annotators) > 1 and not filters.judges
    if limit is not None and filters.annotators is not None and several:
        # Each person's labels are in order in an index; those of several would all be sorted for the sake of a page.
        each = (
            labels(connection, replace(filters, annotators=[name]), as_of=as_of, before=before, limit=limit,
                   newest_first=newest_first)
            for name in dict.fromkeys(filters.annotators)
        )  # fmt: skip
        return islice(merge(*each, key=lambda label: label.event, reverse=newest_first), limit)
    query, values = _standing(connection, _LABEL, filters, as_of)
    number = "s.event" if as_of is None else "e.id"
    if before is not None:
        query, values = f"{query} AND {number} < ?", [*values, before]
    query += f" ORDER BY {number}{' DESC' if newest_first else ''}"
    if limit is not None:
        query, values = f"{query} LIMIT ?", [*values, limit]
    return map(_label, connection.execute(query, values))


def _standing(
    connection: sqlite3.Connection, columns: str, filters: Filters, as_of: int | None
) -> tuple[str, list[Any]]:
    """A query for labels that stand, without its order, and its values."""
    values: list[Any] = []
    if as_of is None:
        query, annotator, number = f"{columns}{_NOW} WHERE 1", "s.annotator", "s.event"
    else:
        annotator, number = "e.annotator", "e.id"
        query = f"{columns}{_THEN} WHERE e.kind = 'label' AND e.id <= ?"
        query += " AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id AND u.id <= ?)"
        values += [as_of, as_of]
    if filters.annotators is not None:
        people = [person_of(connection, name)["id"] for name in filters.annotators]
        theirs = f"{annotator} IN ({', '.join('?' * len(people))})"
        query += f" AND ({theirs} OR {_BY_A_JUDGE})" if filters.judges else f" AND {theirs}"
        values += people
    elif not filters.judges:
        query += f" AND NOT {_BY_A_JUDGE}"
    for sign, time in zip((">=", "<"), time_bounds(filters.since, filters.until), strict=True):
        if time is not None:
            query, values = f"{query} AND {number} {sign} ?", [*values, _first_event(connection, time)]
    if filters.guideline is not None:
        newest = guideline_now(connection) or 0
        if not 1 <= filters.guideline <= newest:
            raise StoreError(
                f"guideline={filters.guideline} is no version of the guidelines here, so no label could be meant. "
                + (f"Give 1 to {newest}." if newest else "There are none yet: leave it out.")
            )
        query += f" AND (e.guideline = ? OR {_BY_A_JUDGE})"  # guidelines are for people; a judge has its constitution
        values.append(filters.guideline)
    return query, values


def _first_event(connection: sqlite3.Connection, time: str) -> int:
    """The first event at `time` or later; past the last one where there is none. Times never go back (`judgments`)."""
    row = connection.execute("SELECT id FROM events WHERE at >= ? ORDER BY at, id LIMIT 1", (time,)).fetchone()
    return int(row["id"]) if row else last_event(connection) + 1


@lru_cache(maxsize=1024)
def _numbers(text: str) -> tuple[int, ...]:
    """A JSON list of answer indices; there are few that differ, and a million of them."""
    return tuple(json.loads(text))


def _label(row: sqlite3.Row) -> Label:
    ranking = _numbers(row["ranking"]) if row["ranking"] else None
    axes = json.loads(row["axes"]) if row["axes"] else {}
    return Label(**dict(row) | {"ranking": ranking, "axes": axes, "order": _numbers(row["order"])})


# ---------------------------------------------------------------- preferences


def preferences(
    connection: sqlite3.Connection, filters: Filters, *, as_of: int | None = None, gold: bool = False,
    repeats: bool = False,
) -> Preferences:  # fmt: skip
    """Labels as rows of prompt, chosen, rejected; gold and repeats: keep those too."""
    query, values = _standing(connection, _PAIR, filters, as_of)
    rows: list[dict[str, Any]] = []
    ties, left_out = 0, dict.fromkeys(("skips", "gold", "repeats"), 0)
    for row in connection.execute(f"{query} ORDER BY e.id", values):
        if row["gold"] is not None and not gold:
            left_out["gold"] += 1
        elif row["repeat_of"] is not None and not repeats:
            left_out["repeats"] += 1
        elif row["choice"] == "skip":
            left_out["skips"] += 1
        else:
            rows += _pairs(row)
            ties += row["choice"] in TIES
    return Preferences(rows=rows, ties=ties, **left_out)


def _pairs(row: sqlite3.Row) -> Iterator[dict[str, Any]]:
    """The pairs that one label says: one, or every pair of a ranking, all in one group; of a tie, either may win."""
    prompt, answers = json.loads(row["prompt"]), _answers(row)
    best_first: Sequence[int]
    if row["choice"] == RANKING:
        best_first = json.loads(row["ranking"])
    else:
        best_first = (1, 0) if row["choice"] == "b" else range(len(answers))
    group = row["grp"] or (f"item-{row['repeat_of'] or row['item']}" if len(answers) > 2 else None)
    for better, worse in combinations(best_first, 2):
        yield {
            "prompt": prompt,
            "chosen": _in_form_of(prompt, answers[better].text),
            "rejected": _in_form_of(prompt, answers[worse].text),
            "chosen_finish_reason": answers[better].finish_reason,
            "rejected_finish_reason": answers[worse].finish_reason,
            "probability": _probability(row),
            "strength": row["strength"],
            "annotator": row["annotator"],
            "item": row["item"],
            "group": group,
            "axes": _in_terms_of(row["choice"], json.loads(row["axes"]) if row["axes"] else None),
            "note": row["note"],
        }


def _probability(row: sqlite3.Row) -> float:
    """That the answer that stands as chosen is preferred: a judge's own, of a person 1, and 0.5 of a tie."""
    if row["choice"] in TIES:
        return 0.5
    if row["probability"] is None:
        return 1.0
    return float(max(row["probability"], 1 - row["probability"]))


def _in_form_of(prompt: Any, text: str) -> Any:
    """An answer in its prompt's form."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _in_terms_of(choice: str, axes: dict[str, str] | None) -> dict[str, str] | None:
    """Axes as chosen, rejected or tie: a row no longer knows which answer was a."""
    if axes is None:
        return None
    chosen = "b" if choice == "b" else "a"  # of a tie, as of a, answer 0 stands as chosen
    return {axis: side if side == "tie" else "chosen" if side == chosen else "rejected" for axis, side in axes.items()}


# ---------------------------------------------------------------- events


def last_event(connection: sqlite3.Connection) -> int:
    """The number of the newest event, 0 if there is none."""
    newest: int = connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]
    return newest


def events(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """What happened, oldest first, as JSON can hold it."""
    rows = connection.execute(
        "SELECT e.id AS event, e.kind, a.name AS annotator, e.item, e.key, e.at, e.guideline, e.choice, e.ranking, "
        "e.strength, e.axes, e.note, e.reason, e.shown, e.seconds, e.undoes, v.probability, v.principle, v.answers "
        "FROM events e JOIN annotators a ON a.id = e.annotator LEFT JOIN verdicts v ON v.event = e.id ORDER BY e.id"
    )
    for row in rows:
        event = {name: row[name] for name in row.keys() if row[name] is not None}  # noqa: SIM118  a Row iterates values
        yield event | {
            name: json.loads(event[name]) for name in ("ranking", "axes", "shown", "answers") if name in event
        }
