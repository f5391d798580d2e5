"""Stores to try things on, with a clock that a test moves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tether.feedback.store import Store


class Clock:
    """Seconds since 1970 that pass only when a test says so."""

    now = 1_790_000_000.0  # 2026-09-21T14:13:20Z

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    """Without gold and repeats, so that a test meets only what it added."""
    made = Store(tmp_path / "preferences.db", gold_fraction=0, repeat_fraction=0, clock=clock)
    for name in ("Ada", "Bo", "Cy"):
        made.add_annotator(name)
    return made


@pytest.fixture
def say(store: Store) -> Callable[..., int]:
    """Have somebody judge their next item: `choice` in stored order. Returns the item."""
    count = iter(range(10**9))

    def judge(who: str, choice: str = "a", **said) -> int:
        task = store.next_task(who)
        assert task is not None
        store.record(who, task.item, key=f"key-{next(count)}", choice=choice, **said)
        return task.item

    return judge
