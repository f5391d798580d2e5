"""How far a command is that asks a model many things: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tether.train.log import say

_SILENCE_S = 5.0  # without a terminal a line says this often how far it is


class _Lines:
    """Without a terminal: a plain line every few seconds."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._last = total, unit, time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, done: int, summary: str) -> None:
        if time.monotonic() - self._last > _SILENCE_S:
            say(f"{done}/{self._total} {self._unit}  {summary}")
            self._last = time.monotonic()


class _Bar:
    """On a terminal: a bar, and what it cost so far."""

    def __init__(self, total: int, unit: str) -> None:
        self._progress = Progress(
            TextColumn(unit), MofNCompleteColumn(), BarColumn(bar_width=20),
            TextColumn("{task.fields[summary]}", markup=False), TimeRemainingColumn(),
            console=Console(highlight=False),
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total, summary="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, summary: str) -> None:
        self._progress.update(self._task, completed=done, summary=summary)


def screen(total: int, unit: str) -> _Lines | _Bar:
    """A context whose `show(done, summary)` says how many of `total` are done; unit: what is counted, in the plural."""
    return _Bar(total, unit) if sys.stdout.isatty() else _Lines(total, unit)
