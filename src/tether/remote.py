"""Calls to another machine that may fail for a while: tried again, with waits that grow, until a deadline.

    def ask(left_s: float) -> Answer:                   # any client, its own retries turned off
        try:
            response = client.post(url, json=body, timeout=min(60, left_s))
        except httpx2.TransportError as error:
            raise Temporary(first_line(error)) from error
        if (failure := temporary(response.status_code, response.headers)) is not None:
            raise failure
        return read(response)                           # whatever else it raises passes through at once

    answer = with_retries(ask, deadline_s=300, retries=5)

What is temporary: a connection that failed, a timeout, and the status codes of `temporary`. The caller says so, by
raising `Temporary`: this file knows no HTTP client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from random import Random
from typing import TypeVar

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.25  # the longest wait before the second attempt; each further one may be twice as long
LONGEST_WAIT_S = 20.0


class Temporary(Exception):
    """One attempt failed in a way that may pass. retry_after: seconds that the server asks us to wait, if it does."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class GaveUp(Exception):
    """Every attempt failed. Its text is the last reason, how often and how long it was tried; the cause is the last
    `Temporary`."""

    def __init__(self, reason: str, attempts: int, seconds: float) -> None:
        times = "once" if attempts == 1 else f"{attempts} times"
        super().__init__(f"{reason.rstrip('.')}; tried {times} in {seconds:.1f} s")
        self.reason, self.attempts, self.seconds = reason, attempts, seconds


class Cancelled(Exception):
    """Somebody set `stop` while a call was to be made or tried again."""


def with_retries(
    call: Callable[[float], Answer], *, deadline_s: float, retries: int | None = None, random: Random | None = None,
    stop: threading.Event | None = None,
) -> Answer:  # fmt: skip
    """What `call` returns, at its first attempt that does not raise `Temporary`; what else it raises passes through.

    Before attempt n + 1 it waits for a time drawn from 0 to FIRST_WAIT_S · 2^(n-1), LONGEST_WAIT_S at most, or for as
    long as the server asks if that is longer. Drawn from 0 on ("full jitter"), so that clients that failed together do
    not come back together: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    call        is given the seconds that are left: the longest that it may take.
    deadline_s  seconds for everything, waits included: GaveUp when they are over, or would be before the server wants
                to be asked again.
    retries     attempts after the first; None: as many as the deadline allows.
    random      draws the waits; None: a generator of its own, so that nobody's seeded numbers move.
    stop        set by another thread, it ends a wait: Cancelled. In the main thread a signal handler that raises, as
                that of `tether.train.signals`, or Ctrl-C, needs no such event.
    """
    random, stop = random or Random(), stop or threading.Event()
    began = time.monotonic()
    attempts = 0
    while True:
        if stop.is_set():
            raise Cancelled
        attempts += 1
        try:
            return call(max(deadline_s - (time.monotonic() - began), 0.001))
        except Temporary as failure:
            elapsed = time.monotonic() - began
            left = deadline_s - elapsed
            asked = failure.retry_after or 0.0
            if left < FIRST_WAIT_S or asked >= left or (retries is not None and attempts > retries):
                raise GaveUp(str(failure), attempts, elapsed) from failure
            # At most half of what is left, so that the last wait does not use up the time for the last attempt.
            wait = random.uniform(0, min(FIRST_WAIT_S * 2 ** min(attempts - 1, 30), LONGEST_WAIT_S, left / 2))
        if stop.wait(max(wait, asked)):
            raise Cancelled


def temporary(status: int, headers: Mapping[str, str], detail: str = "") -> Temporary | None:
    """The failure that an HTTP status stands for, if it may pass: 408, 429 and 5xx; None for any other.

    headers: of the response, as a mapping that does not care about case, such as every client has.
    detail: what the server said, for the message.
    """
    if status not in (408, 429) and not 500 <= status < 600:
        return None
    return Temporary(f"{describe_status(status)}{f': {detail}' if detail else ''}", _retry_after(headers))


def describe_status(status: int) -> str:
    """`HTTP 503 Service Unavailable`"""
    known = {s.value: f" {s.phrase}" for s in HTTPStatus}
    return f"HTTP {status}{known.get(status, '')}"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); None where it has neither."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return seconds if 0 <= seconds < float("inf") else None
