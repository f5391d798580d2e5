"""Work in a thread beside the main one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(call: Callable[[], T], name: str, *, waited_for: bool = False) -> Future[T]:
    """Call it in a thread of its own.

    waited_for: by the end of the process. What computes must be, or torch aborts where the interpreter goes away under
        it; what waits for another machine should not be, as it would be in a pool.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=not waited_for).start()
    return future
