"""SIGINT and SIGTERM, turned into a clean stop: what can be repeated is dropped, what cannot is finished, then we save.

    with Signals() as signals:
        for cycle in …:
            with signals.droppable():      # phase 1: a signal here raises StopRequested at once
                …
            …                              # phase 2: a signal here waits
        signals.stop_if_requested()        # StopRequested, before the next phase

A second signal kills the process without saving, whatever it is doing.

Where the run has several processes none may leave a phase alone: the others would wait for it. A signal then waits in
both phases, and between them it is asked whether any process got one. What follows within a second is the same request.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tether.distributed.ranks import ALONE, Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PASSED_ON_S = 1.0  # torchrun passes on a signal that a scheduler may have sent to everybody: one request, not two


class StopRequested(KeyboardInterrupt):
    """A signal arrived in a phase that can be dropped.

    A KeyboardInterrupt, not an Exception: a reward function's own `except Exception` must not swallow it.
    """


class Signals:
    """Catches SIGINT and SIGTERM while the block runs, and puts the handlers back that were there.

    Python delivers signals to the main thread alone; in any other, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False  # a signal has arrived
        self.ranks: Ranks = ALONE
        self._at = 0.0
        self._droppable = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """A block that may be left at any instruction: a signal, now or before, raises StopRequested."""
        self.stop_if_requested()
        self._droppable = self.ranks.size == 1
        try:
            yield
        except KeyboardInterrupt:
            if self._droppable and self.requested:
                raise StopRequested from None  # a library that waits, as Ray does, may raise one of its own instead
            raise
        finally:
            self._droppable = False
        self.stop_if_requested()  # someone inside may have swallowed it

    def stop_if_requested(self) -> None:
        if self.ranks.agree(self.requested):
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and self.ranks.size > 1 and time.monotonic() < self._at + _PASSED_ON_S:
            return
        if self.requested:
            _say(f"{name} again: quitting without saving.")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # as if it had never been caught: no thread or destructor can hold it up
            return
        self.requested, self._at = True, time.monotonic()
        what = "dropping this phase" if self._droppable else "finishing this phase"
        if self.ranks.rank == 0:
            _say(f"{name}: {what}, then saving. Once more quits without saving.")
        if self._droppable:
            raise StopRequested


def _say(text: str) -> None:
    # Not print: the signal may have arrived inside one, and buffered streams cannot be entered twice.
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    with suppress(BrokenPipeError):  # a reader of ours may have died of the same Ctrl-C
        os.write(2, f"{show_cursor}\n{text}\n".encode())
