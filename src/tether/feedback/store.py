"""The store of labels: one SQLite file that any number of threads and processes share.

    store = Store("preferences.db")
    store.add_items([Item("Once upon a time", (Answer(" there was"), Answer(" !!")))])
    store.add_annotator("Ada")
    task = store.next_task("Ada")
    store.record("Ada", task.item, key=str(uuid4()), choice=task.choice_of(0), strength=2)
    store.preference_rows()

What serves an annotator (`next_task`, `record`, `undo`, `history`, `progress`) never tells what others said. The rest
is for whoever runs the project.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tether.errors import StoreError
from tether.feedback import judgments, queue, reading
from tether.feedback.export import export
from tether.feedback.records import (
    JUDGE,
    Added,
    AnnotatorProgress,
    Exported,
    Filters,
    Guideline,
    Item,
    Judgment,
    Label,
    Preferences,
    Progress,
    Receipt,
    StoredItem,
    Task,
    Verdict,
    iso_time,
)
from tether.feedback.schema import Database, to_json

_LARGEST = 2**63 - 1  # of SQLite's integers: a number from an address may be anything
LEASE_S = 600.0  # seconds: long enough for two long answers, short enough that nobody waits for one who has left
_MADE_WITH = {"seed": 0, "gold_fraction": 0.1, "repeat_fraction": 0.05}
_SETTINGS = "SELECT name, value FROM settings"
_EVERYTHING = Filters()


class Store:
    """Labels in the file `path`; every method may be called from any thread.

    create           make the file if it is not there; else that is a StoreError.
    upgrade          bring a file of an older schema up to date. Without it nothing is written to it.
    seed, gold_fraction, repeat_fraction
                     how tasks are ordered and mixed. Set when the file is made, and kept in it: None takes what is
                     there (new: 0, 0.1, 0.05), another value is a StoreError, since people would meet items twice.
    lease_s          seconds that an item is one annotator's.
    busy_s           seconds to wait for another process that writes.
    clock            seconds since 1970.
    """

    def __init__(
        self, path: str | Path, *, create: bool = True, seed: int | None = None, gold_fraction: float | None = None,
        repeat_fraction: float | None = None, lease_s: float = LEASE_S, busy_s: float = 10.0, upgrade: bool = True,
        clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self.path = Path(path)
        for name, fraction in (("gold_fraction", gold_fraction), ("repeat_fraction", repeat_fraction)):
            check_fraction(name, fraction)
        self._clock = clock
        self._database = Database(self.path, create=create, busy_s=busy_s, upgrade=upgrade)
        settings = {"seed": seed, "gold_fraction": gold_fraction, "repeat_fraction": repeat_fraction}
        self.mix = queue.Mix(**self._settle(settings), lease_s=lease_s)

    def _settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that the file was made with; into a new file, those asked for."""
        with self._database.read() as c:
            kept = dict(c.execute(_SETTINGS))
        if not kept:
            with self._database.write() as c:
                for name, default in _MADE_WITH.items():
                    value = default if settings[name] is None else settings[name]
                    c.execute("INSERT INTO settings VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value))
                kept = dict(c.execute(_SETTINGS))
        for name, wanted in settings.items():
            if wanted is not None and wanted != kept[name]:
                raise StoreError(
                    f"{name}={wanted} for {self.path}, which was made with {kept[name]}: people would meet items in "
                    "another order, on other sides. Leave it out, or make another store."
                )
        return kept

    def close(self) -> None:
        """Close the file. The store must not be used again, in any thread."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------ making the queue

    def add_items(self, items: Iterable[Item], *, overlap: float = 0.2, first: bool = False) -> Added:
        """Queue items behind those that are there; what is there already, prompt and answers alike, stays one item.

        first: before those that are there: whoever labels next is asked these. What waits already goes there too, and
            its source takes up what the new one says.
        overlap: share of them that two people are to judge, drawn by the seed. Items with gold are asked everybody.
        """
        check_fraction("overlap", overlap)
        with self._database.write() as c:
            return queue.add_items(c, items, overlap=overlap, seed=self.mix.seed, first=first)

    def number_of(self, item: Item) -> int | None:
        """The number that an item has here; None where it is not."""
        with self._database.read() as c:
            row = queue.row_of(c, queue.fingerprint(item))
            return None if row is None else int(row["id"])

    def labels_wanted(self, item: Item) -> int | None:
        """How many labels of people an item still waits for; None: it is not here. Of gold, which checks people, 0."""
        with self._database.read() as c:
            return queue.labels_wanted(c, item)

    def add_annotator(self, name: str) -> bool:
        """Register somebody who labels; False if the name is there already."""
        name = name.strip()
        _check_person(name)
        return self._add_annotator(name)

    def _add_annotator(self, name: str) -> bool:
        if not name or len(name) > 100 or not name.isprintable():
            raise StoreError(
                f"{name[:100]!r} is not a name that labels could be told apart by. Give 1 to 100 printable characters."
            )
        with self._database.read() as c:  # pages call this often, and writers wait for each other
            if c.execute("SELECT 1 FROM annotators WHERE name = ?", (name,)).fetchone():
                return False
        with self._database.write() as c:
            added = c.execute(
                "INSERT INTO annotators (name, at, cursor, gold_cursor) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (name, iso_time(self._clock()), -_LARGEST, -_LARGEST),  # before every position, of items put first too
            )
            return added.rowcount == 1

    def add_judge(self, name: str, made_of: dict[str, Any]) -> None:
        """Register a model that labels; StoreError where one of that name labels here that is made of something else.

        name: judge:NAME. made_of: what its labels depend on; until it has labeled something, that may change.
        """
        self._add_annotator(name)
        with self._database.write() as c:
            kept = c.execute("SELECT made_of FROM judges WHERE name = ?", (name,)).fetchone()
            if kept is None or not queue.person_of(c, name)["labels"]:
                c.execute("INSERT OR REPLACE INTO judges VALUES (?, ?)", (name, to_json(made_of)))
                return
        before = json.loads(kept["made_of"])
        if changed := [key for key, value in made_of.items() if before.get(key) != value]:
            raise StoreError(
                f"{name} has labeled in {self.path} with another {' and '.join(changed)}: two judges would stand under "
                "one name. Set judge.name to another name, or put back what was there."
            )

    def add_guidelines(self, text: str) -> int:
        """Put a text in force; returns its version. The text that is in force already stays the version it is."""
        if not text.strip():
            raise StoreError("the guidelines are empty: nobody would know what to go by. Give a text.")
        with self._database.write() as c:
            newest = c.execute("SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1").fetchone()
            if newest and newest["text"] == text:
                return int(newest["version"])
            version = int(newest["version"]) + 1 if newest else 1
            c.execute("INSERT INTO guidelines VALUES (?, ?, ?)", (version, text, iso_time(self._clock())))
            return version

    # ------------------------------------------------------------ for the person who labels

    def next_task(self, annotator: str) -> Task | None:
        """The item that this annotator holds, or the next one, theirs for `lease_s`; None if nothing is left."""
        now = self._clock()
        with self._database.read() as c:
            if task := queue.held_task(c, annotator, now, self.mix):
                return task
        with self._database.write(durable=False) as c:  # a lease that is lost is given again
            return queue.next_task(c, annotator, now, self.mix)

    def record(
        self, annotator: str, item: int, *, key: str, choice: str | Sequence[int], strength: int | None = None,
        axes: dict[str, str] | None = None, note: str | None = None, reason: str | None = None,
        seconds: float | None = None, on_screen: bool = False,
    ) -> Receipt:  # fmt: skip
        """Keep a judgment for good; it is on the disk when this returns.

        item: the one that `next_task` gave this annotator last; its lease may have run out if nobody else took it.
        key: made up by the client for this judgment. Sent again with the same content, it returns the first receipt
            and changes nothing (`seconds` may differ); with other content it is a LabelError.
        choice: a, b (answers 0 and 1 in stored order: `Task.choice_of`), both_good, both_bad, skip; or, for items with
            more answers, stored indices, best first (`Task.ranking_of`).
        on_screen: choice and axes number the answers by their place on the screen instead, from left to right or top to
            bottom: a is the left one. What a page sends: it must not tell the stored order.
        strength: 1 slightly, 2 clearly, 3 much better; with a and b alone.
        axes: of helpful, harmless, honest, each a, b or tie. reason: of a skip. seconds: spent on it.
        """
        _check_person(annotator)
        judgment = Judgment.of(choice, strength=strength, axes=axes or {}, note=note, reason=reason)
        with self._database.write() as c:
            return judgments.record(
                c, annotator, item, key, judgment, on_screen=on_screen, seconds=seconds, now=self._clock(), mix=self.mix
            )

    def judge_queue(self, judge: str) -> Iterator[tuple[int, str, bool]]:
        """(number, kind, labeled by this judge) of every item but repeats, in the order of their queues."""
        with self._database.snapshot() as c:
            yield from reading.judge_queue(c, judge)

    def record_verdicts(self, judge: str, verdicts: Sequence[Verdict]) -> None:
        """Keep a judge's labels, all or none of them; an item that it has labeled already keeps the label it has."""
        with self._database.write() as c:
            for verdict in verdicts:
                judgments.record_verdict(c, judge, verdict, now=self._clock())

    def undo(self, annotator: str, *, key: str) -> Receipt | None:
        """Withdraw the annotator's latest label or skip; `next_task` gives its item back. None: none stands.

        A skipped item that somebody else has been given since is theirs: `next_task` then gives another.
        key: as for `record`, so that a request sent twice undoes one label.
        """
        _check_person(annotator)
        with self._database.write() as c:
            return judgments.undo(c, annotator, key, now=self._clock(), mix=self.mix)

    def history(self, annotator: str, *, before: int | None = None, limit: int = 50) -> list[Label]:
        """The annotator's own labels that stand, newest first; before: an event number, for the next page.

        `gold` and `repeat_of` are None throughout: they would tell people what checks them.
        """
        with self._database.read() as c:
            own = Filters(annotators=[annotator])
            before = None if before is None else min(before, _LARGEST)
            found = reading.labels(c, own, before=before, limit=limit, newest_first=True)
            return [replace(label, gold=None, repeat_of=None) for label in found]

    def progress(self, annotator: str) -> AnnotatorProgress:
        """How much this annotator has done."""
        with self._database.read() as c:
            row = queue.person_of(c, annotator)
            return AnnotatorProgress(row["name"], row["labels"], row["skips"])

    def guideline(self, version: int | None = None) -> Guideline | None:
        """A version of the guidelines; None the one in force, if there is any."""
        with self._database.read() as c:
            wanted = queue.guideline_now(c) if version is None else min(version, _LARGEST)
            row = c.execute("SELECT version, text, at FROM guidelines WHERE version = ?", (wanted,)).fetchone()
            return Guideline(*row) if row else None

    # ------------------------------------------------------------ for whoever runs the project

    def overview(self) -> Progress:
        """How far the whole project is, from counters."""
        with self._database.read() as c:
            totals = c.execute("SELECT items, gold, wanted, remaining FROM totals").fetchone()
            people = c.execute("SELECT name, labels, skips FROM annotators ORDER BY name")
            annotators = tuple(AnnotatorProgress(*row) for row in people)
            return Progress(**dict(totals), annotators=annotators, guideline=queue.guideline_now(c))

    def item(self, number: int) -> StoredItem:
        """One item with everything that is known of it."""
        (found,) = self.items([number])
        return found

    def items(self, numbers: Iterable[int]) -> list[StoredItem]:
        """Likewise of several, in the order asked for."""
        numbers = list(numbers)
        with self._database.read() as c:
            found = {item.id: item for item in reading.items(c, [n for n in numbers if n <= _LARGEST])}
        if missing := [number for number in numbers if number not in found]:
            raise StoreError(f"there is no item {missing[0]} in this store. Is it an item of another one?")
        return [found[number] for number in numbers]

    def labels(
        self, filters: Filters = _EVERYTHING, *, as_of: int | None = None, before: int | None = None,
        limit: int | None = None, newest_first: bool = False,
    ) -> Iterator[Label]:  # fmt: skip
        """Labels that stand (of gold items and repeats, ties, skips too), as when event `as_of` was the newest."""
        with self._database.snapshot() as c:
            yield from reading.labels(c, filters, as_of=as_of, before=before, limit=limit, newest_first=newest_first)

    def preferences(
        self, filters: Filters = _EVERYTHING, *, as_of: int | None = None, gold: bool = False, repeats: bool = False
    ) -> Preferences:
        """Rows to fit a reward model to, and counts of what did not become one. The order is that of labeling.

        Columns: prompt, chosen, rejected (messages where the prompt is messages), chosen_finish_reason,
        rejected_finish_reason, probability (that chosen is preferred: 1, of a tie 0.5, a judge's own), strength,
        annotator, item, group, axes (chosen, rejected or tie), note.
        A ranking of K answers is K·(K-1)/2 rows that share a group.
        """
        with self._database.read() as c:
            return reading.preferences(c, filters, as_of=as_of, gold=gold, repeats=repeats)

    def preference_rows(self, filters: Filters = _EVERYTHING, **options: Any) -> list[dict[str, Any]]:
        """The rows of `preferences`."""
        return self.preferences(filters, **options).rows

    def events(self) -> Iterator[dict[str, Any]]:
        """Every label and undo, oldest first."""
        with self._database.snapshot() as c:
            yield from reading.events(c)

    def last_event(self) -> int:
        """The newest event's number: as long as it is the same, so is everything that follows from labels."""
        with self._database.read() as c:
            return reading.last_event(c)

    def export(self, to: str | Path, filters: Filters = _EVERYTHING) -> Exported:
        """Write preferences.jsonl, events.jsonl and items.jsonl into a directory, all of one moment."""
        with self._database.snapshot() as c:
            return export(c, Path(to), filters)


def check_fraction(name: str, fraction: float | None) -> None:
    """StoreError for a number outside [0, 1]; None is allowed."""
    if fraction is not None and not 0 <= fraction <= 1:
        raise StoreError(f"{name}={fraction} must be in [0, 1]: it is a share of the items. Give 0.2, say.")


def _check_person(name: str) -> None:
    """Raise StoreError for the name of a judge: nobody labels in its name, or takes a label of it back."""
    if name.startswith(JUDGE):
        raise StoreError(
            f"{name[:100]!r} begins like the name of a judge, which is a model: a person's labels would count as its "
            "labels. Give another name."
        )
