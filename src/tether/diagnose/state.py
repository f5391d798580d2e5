"""Whether a run is still alive, from its status and its heartbeat."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

PATIENCE_S = 600.0
"""A running run writes its heartbeat at every phase of a cycle. None for this long: the process is gone or hangs."""

RECENT = 20
"""Cycles whose phases say how long the next may take."""


def state(
    status: dict[str, Any], now: datetime, *, patience_s: float = PATIENCE_S
) -> Literal["running", "finished", "stopped", "failed", "stale"]:
    """The run's state; stale where it says `running`, and its last heartbeat is older than `patience_s`."""
    recorded = status.get("state")
    if recorded != "running":
        return recorded if recorded in ("finished", "stopped", "failed") else "stale"
    age = silence_s(status, now)
    return "running" if age is not None and age <= patience_s else "stale"


def silence_s(status: dict[str, Any], now: datetime) -> float | None:
    """Seconds since the last heartbeat; None if there never was one."""
    try:
        beat = datetime.fromisoformat(str(status.get("heartbeat")))
    except ValueError:
        return None
    return (now - (beat if beat.tzinfo else beat.replace(tzinfo=UTC))).total_seconds()


def patience_s(metrics: Sequence[dict[str, Any]]) -> float:
    """How long a run may be silent: three times the longest phase of its last cycles, and ten minutes at least."""
    phases: list[float] = [
        v for m in metrics[-RECENT:] for name, v in m.items() if name.startswith("time/") and v is not None
    ]
    return max([PATIENCE_S, *(3 * p for p in phases)])
