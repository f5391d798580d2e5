"""The values that go into the store and come out of it: plain, frozen, checked once at the door."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from tether.errors import LabelError, StoreError

Prompt = str | list[dict[str, Any]]  # plain text, or chat messages that wait for an answer

TIES = ("both_good", "both_bad", "tie")  # tie is a judge's: it does not say which of the two
CHOICES = (
    "a",
    "b",
    "both_good",
    "both_bad",
    "skip",
)  # "a" and "b" are answers 0 and 1 in stored order, wherever they were shown
AXES = ("helpful", "harmless", "honest")
SIDES = ("a", "b", "tie")
JUDGE = "judge:"  # how the names of judges begin, and nobody else's
RANKING = "ranking"  # the choice of a label whose answers were put in an order
LONGEST_TEXT = 10_000  # characters of a note or reason: a page's mistake or an attack is longer


# ---------------------------------------------------------------- in


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to be judged."""

    text: str
    source: dict[str, Any] | None = None  # where it comes from: run, cycle, model, response_index, …; never shown
    finish_reason: str = "stop"  # or length: it was cut there, so no stop token belongs to it

    def __post_init__(self) -> None:
        if self.finish_reason not in ("stop", "length"):
            raise StoreError(
                f"an answer's finish_reason is {self.finish_reason!r}: it is unclear whether a stop token follows. "
                "Write stop or length."
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One question to people: which of these answers is better?"""

    prompt: Prompt
    answers: tuple[Answer, ...]  # two are a pair, more are ranked
    group: str | None = None  # items that are not independent share one
    gold: int | None = None  # index of the answer known to be better: the item checks people, and trains nothing
    source: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and not self.prompt:
            raise StoreError("an item's prompt is an empty list: nothing would be asked. Give a text or messages.")
        if len(self.answers) < 2:
            raise StoreError(
                f"an item has {len(self.answers)} answers, so there is nothing to compare. Give two or more."
            )
        if len({answer.text for answer in self.answers}) < len(self.answers):
            raise StoreError(
                f"an item has the answer {self.answers[0].text[:40]!r} twice: nobody could prefer one to itself. "
                "Give answers that differ."
            )
        if self.gold is not None and not 0 <= self.gold < len(self.answers):
            raise StoreError(
                f"gold={self.gold} is no index of {len(self.answers)} answers: everybody would be wrong. "
                f"Give 0 to {len(self.answers) - 1}."
            )

    @property
    def kind(self) -> str:
        return "pair" if len(self.answers) == 2 else "rank"


@dataclass(frozen=True, slots=True)
class Judgment:
    """What a person chose about an item. `check` holds it against the item's answers.

    Answers are numbered as they are stored, or by their place on the screen (`as_stored`): a is number 0, b number 1.
    """

    choice: str  # one of CHOICES, or RANKING
    ranking: tuple[int, ...] | None = None  # answer indices, best first
    strength: int | None = None  # 1 slightly, 2 clearly, 3 much; None for ties, rankings, and where none was given
    axes: dict[str, str] = field(default_factory=dict)  # of AXES, each one of SIDES
    note: str | None = None
    reason: str | None = None  # why it was skipped

    @classmethod
    def of(cls, choice: str | Sequence[int], **details: Any) -> Judgment:
        """choice: one of CHOICES, or answer indices, best first."""
        if isinstance(choice, str):
            return cls(choice, None, **details)
        return cls(RANKING, tuple(choice), **details)

    def as_stored(self, order: Sequence[int]) -> Judgment:
        """This judgment of places on the screen as one of stored answers; order: `Task.order`."""
        letters = {"a": "ab"[order[0]], "b": "ab"[order[1]]} if len(order) == 2 else {}
        return replace(
            self,
            choice=letters.get(self.choice, self.choice),
            ranking=None if self.ranking is None else tuple(order[place] for place in self.ranking),
            axes={axis: letters.get(side, side) for axis, side in self.axes.items()},
        )

    def check(self, answers: int) -> None:
        """Raise LabelError where this is not a judgment of so many answers."""
        _check_choice(self.choice, self.ranking, answers)
        if self.strength is not None and (self.strength not in (1, 2, 3) or self.choice not in ("a", "b")):
            raise LabelError(
                f"strength={self.strength!r} for the choice {self.choice!r}: it would mean nothing. Give 1, 2 or 3 for "
                "a or b, nothing for anything else."
            )
        for axis, side in self.axes.items():
            if axis not in AXES or side not in SIDES or answers != 2:
                raise LabelError(
                    f"axes: {axis!r}: {side!r} is not a judgment of a pair. The axes are {', '.join(AXES)}, each "
                    f"{', '.join(SIDES)}."
                )
        if self.choice == "skip" and not (self.reason or "").strip():
            raise LabelError("a skip without a reason: nobody could fix the item. Say why.")
        if self.choice != "skip" and self.reason is not None:
            raise LabelError(f"a reason for the choice {self.choice!r}: only a skip has one. Use the note.")
        for name, text in (("note", self.note), ("reason", self.reason)):
            if text is not None:
                check_text(name, text, LONGEST_TEXT)


def _check_choice(choice: str, ranking: tuple[int, ...] | None, answers: int) -> None:
    if choice == RANKING:
        if answers == 2 or ranking is None or sorted(ranking) != list(range(answers)):
            raise LabelError(
                f"the ranking {list(ranking or ())} does not order {answers} answers, so pairs would be missing. "
                + ("Choose a or b." if answers == 2 else f"Name each of 0 to {answers - 1} once, best first.")
            )
    elif choice not in CHOICES or (answers > 2 and choice in ("a", "b")):
        allowed = CHOICES if answers == 2 else (*CHOICES[2:], "a list of indices")
        raise LabelError(
            f"choice={choice!r} is none for an item with {answers} answers: it would train nothing. Give one of "
            f"{', '.join(allowed)}."
        )


def prompt_of(text: str) -> Prompt:
    """A prompt as it was before a rollout made one string of it."""
    if text.startswith("[{"):
        try:
            messages = json.loads(text)
        except ValueError:
            return text  # it only looks like messages
        if all(isinstance(message, dict) and "role" in message for message in messages):
            return list(messages)
    return text


def check_text(name: str, text: str, longest: int) -> None:
    """Raise LabelError for what cannot be kept: too long, or half a character."""
    if len(text) > longest:
        raise LabelError(f"{name} has {len(text):,} characters, more than is kept ({longest:,}). Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LabelError(
            f"{name} holds {text[error.start]!r}, half a character, which no file can hold. Write it whole."
        ) from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge, which is a model, makes of a pair."""

    item: int
    probability: float  # that answer 0 is better
    order: tuple[int, ...]  # stored indices as they were shown; where both orders were asked, the first of them
    principle: str
    answers: tuple[dict[str, Any], ...]  # of each order: how it was shown, the probability, what the model wrote

    @property
    def choice(self) -> str:
        return "tie" if self.probability == 0.5 else "a" if self.probability > 0.5 else "b"


# ---------------------------------------------------------------- out, to the person who labels


@dataclass(frozen=True, slots=True)
class Task:
    """An item as one annotator is shown it: nothing in it tells where the answers come from, nor what others said."""

    item: int
    annotator: str
    kind: str  # pair or rank
    prompt: Prompt
    answers: tuple[str, ...]  # in the order in which they are shown
    order: tuple[int, ...]  # order[i] is the stored index of the i-th answer shown
    guideline: int | None  # version in force
    expires: str  # UTC, ISO 8601: until then the item is this annotator's
    number: int  # from 1: its place among those that this annotator judged

    def choice_of(self, place: int) -> str:
        """What to record for the answer shown at `place` of a pair, from 0: "a" or "b"."""
        return "ab"[self.order[place]]

    def ranking_of(self, places: Sequence[int]) -> tuple[int, ...]:
        """What to record for places of the screen, best first."""
        return tuple(self.order[place] for place in places)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was written; the same again for the same key."""

    event: int
    kind: str  # label or undo
    item: int
    annotator: str
    at: str  # UTC, ISO 8601


@dataclass(frozen=True, slots=True)
class AnnotatorProgress:
    """How much one person has done; gold items and repeats count like any other."""

    annotator: str
    labels: int  # that stand, ties included, skips not
    skips: int


# ---------------------------------------------------------------- out, to whoever runs the project


@dataclass(frozen=True, slots=True)
class Guideline:
    """What annotators are asked to go by."""

    version: int  # from 1; the highest is in force
    text: str
    at: str


@dataclass(frozen=True, slots=True)
class Added:
    """What became of items that were added."""

    ids: tuple[int, ...]  # of every item, in the order given; of those that were there already as well
    new: int
    known: int  # same prompt, same answers: already there
    twice: int  # of the new ones, how many are to be judged by two people


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the whole project is."""

    items: int  # without gold and repeats
    gold: int
    wanted: int  # labels that `items` need in all
    remaining: int  # labels that they still need
    annotators: tuple[AnnotatorProgress, ...]  # by name
    guideline: int | None

    @property
    def labels(self) -> int:
        """That stand, of gold items and repeats too."""
        return sum(person.labels for person in self.annotators)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item as it is kept, answers in stored order."""

    id: int
    kind: str
    prompt: Prompt
    answers: tuple[Answer, ...]
    group: str | None
    gold: int | None
    repeat_of: int | None  # the earlier item that this one shows again, sides exchanged
    source: dict[str, Any] | None
    target: int | None  # how many people are to judge it; None: everybody (gold)
    fingerprint: str  # equal for items that ask the same, see `tether.feedback.queue.fingerprint`


@dataclass(frozen=True, slots=True)
class Label:
    """A judgment that stands."""

    event: int
    item: int
    annotator: str
    kind: str  # of the item: pair or rank
    choice: str
    ranking: tuple[int, ...] | None
    strength: int | None
    axes: dict[str, str]
    note: str | None
    reason: str | None
    order: tuple[int, ...]  # as the answers were shown: order[0] was on the left
    seconds: float | None
    guideline: int | None
    at: str
    gold: int | None
    repeat_of: int | None
    longer: int | None  # index of the longest answer; None where two are as long
    probability: float | None = None  # a judge's, that answer 0 is better; None: a person's
    first: float | None = None  # a judge's, that the answer shown first wins: mean over the orders that were asked


@dataclass(frozen=True, slots=True)
class Preferences:
    """Rows to fit a reward model to, and what did not become one."""

    rows: list[dict[str, Any]]
    ties: int  # labels whose rows have probability 0.5
    skips: int
    gold: int  # labels left out because they check people
    repeats: int


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    path: str
    rows: int
    events: int
    items: int


@dataclass(frozen=True, slots=True)
class Filters:
    """Which labels to read; None is every one."""

    annotators: Sequence[str] | None = None
    since: str | None = None  # ISO date or time, UTC where it names no zone; inclusive
    until: str | None = None  # a date means to the end of that day; a time is inclusive
    guideline: int | None = None  # version under which the label was given
    judges: bool = False  # the labels of every judge too; one that `annotators` names is read anyway


def time_bounds(since: str | None, until: str | None) -> tuple[str | None, str | None]:
    """(first, end): UTC times as the store writes them, first ≤ time < end."""
    first = None if since is None else utc_iso(_time("since", since))
    if until is None:
        return first, None
    step = timedelta(days=1) if _is_date(until) else timedelta(milliseconds=1)  # the store's times have milliseconds
    return first, utc_iso(_time("until", until) + step)


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as the store writes them."""
    return utc_iso(datetime.fromtimestamp(seconds, UTC))


def utc_iso(time: datetime) -> str:
    """2026-10-01T09:30:00.000Z, whose alphabetical order is that of time."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time(name: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise StoreError(
            f"{name}={text!r} is no date or time: it is unclear which labels are meant. Write 2026-10-01 or "
            "2026-10-01T09:30."
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
