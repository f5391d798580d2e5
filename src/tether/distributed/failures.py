"""No rank's failure may leave the others waiting: whoever fails says so, and all end within seconds.

What every rank raises at the same place (a reward that failed on rank 0, a signal that was agreed on) is `agreed`, and
needs none of this. Whatever else ends a rank is written into the store that all of them reach. A thread looks there:
a rank that has not ended by itself some seconds after another failed is waiting for it, perhaps inside a library that
no exception reaches, and is ended.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tether.errors import Interrupted, TetherError, TrainingError, first_line

E = TypeVar("E", bound=BaseException)

_LOOK_S = 0.5
_GRACE_S = 4.0
_KEY, _ENDED, _LEFT = "failed", "ended", "left"


class Failures:
    """Where a rank says that it failed, and learns that another did."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.happened = False  # a rank has failed alone: some may be gone
        self.on_end: Callable[[TetherError], None] = lambda error: None  # called before this process is ended

    @classmethod
    @contextmanager
    def watching(cls, store: Any, rank: int, size: int) -> Iterator[Failures]:
        """Inside, a failure here is told to the others, and theirs ends this process."""
        failures, over = cls(store, rank, size), threading.Event()
        thread = threading.Thread(target=failures._watch, args=(over,), name="failures", daemon=True)
        thread.start()
        together = True
        try:
            yield failures
        except BaseException as error:
            together = is_agreed(error)
            raise
        finally:
            if together and rank == 0:
                failures._wait_for_the_others()
            elif together:
                failures._wait_for_rank_0()
            over.set()
            thread.join()
            with suppress(Exception):
                store.add(_LEFT, 1)

    def _wait_for_rank_0(self) -> None:
        """It may still be saving: torchrun ends all processes where one ends with an error."""
        with suppress(Exception):  # the store is gone, and rank 0 with it
            while not self._store.check([_ENDED]) and not self._store.check([_KEY]):
                time.sleep(0.1)

    def _wait_for_the_others(self) -> None:
        """Rank 0 may keep the store that they look into."""
        with suppress(Exception):
            self._store.set(_ENDED, "")
            deadline = time.monotonic() + _GRACE_S
            while self._store.add(_LEFT, 0) < self._size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Around the run: an error that others do not raise as well is told to them, and where another rank failed
        before, its error is raised here too."""
        try:
            yield
        except BaseException as error:
            if is_agreed(error):
                raise
            first = self._tell(error)
            if first["rank"] == self._rank:
                raise
            raise _of_another(first) from error

    def _tell(self, error: BaseException) -> dict[str, Any]:
        """The first failure of the run, this one or another's."""
        self.happened = True
        text = str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {first_line(error)}"
        code = getattr(error, "exit_code", 1)
        ours = {"rank": self._rank, "text": text, "exit_code": code}
        if lost := _lost_another(error):
            ours["text"] = lost
        with suppress(Exception):  # the store is gone, and rank 0 with it
            if lost:  # it may be about to say why
                time.sleep(2 * _LOOK_S)
            first: dict[str, Any] = json.loads(self._store.compare_set(_KEY, "", json.dumps(ours)))
            return first
        return ours | {"rank": 0, "text": "rank 0 has ended"}

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_LOOK_S):
            try:
                first = json.loads(self._store.get(_KEY)) if self._store.check([_KEY]) else None
            except Exception:  # whoever keeps the store has ended
                first = {"rank": -1, "text": "the process that the others meet at has ended", "exit_code": 1}
            if first is not None and first["rank"] != self._rank and not over.wait(_GRACE_S):
                self.on_end(_of_another(first))
                os._exit(first["exit_code"])


def _lost_another(error: BaseException) -> str | None:
    """What to say of an error that only means that another rank is gone, or does not answer."""
    words = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if "imed out" in words:
        return (
            f"another process of the run did not answer in time ({first_line(error)}). If it was working, scoring "
            "say, raise distributed.timeout_s; the same command continues from the last checkpoint"
        )
    if any(sign in words for sign in ("gloo", "NCCL", "onnection", "Broken pipe")):
        return (
            f"another process of the run has ended ({first_line(error)}); the same command continues from the last "
            "checkpoint"
        )
    return None


def _of_another(first: dict[str, Any]) -> TetherError:
    error = TrainingError(f"rank {first['rank']}: {first['text']}" if first["rank"] >= 0 else first["text"])
    error.exit_code = first["exit_code"]
    return mark_agreed(error)


def mark_agreed(error: E) -> E:
    """Every rank raises it, at the same place."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: BaseException) -> bool:
    return isinstance(error, Interrupted) or getattr(error, "agreed", False)
