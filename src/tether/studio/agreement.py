"""How far the labels can be trusted: agreement, habits, gold, and the reward model beside the human ceiling."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from tether.errors import RunError
from tether.feedback.agreement import Agreement, agreement
from tether.feedback.judges import JudgeQuality, judge_quality
from tether.feedback.records import Filters
from tether.feedback.store import Store
from tether.studio.shared import Studio

_USUAL_S = sys.getswitchinterval()
_WAIT_S = 0.05
_MOST_REWARD_RUNS = 8


Statistics = tuple[Agreement, tuple[JudgeQuality, ...]]  # of people, and of every judge beside them


class Computed:
    """The statistics of the newest labels, computed beside the pages: a million labels take longer than a page may."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="agreement")
        self._lock = threading.Lock()
        self._running: tuple[int, Future[Statistics]] | None = None  # up to which event, and the work
        self._newest: tuple[int, Statistics] | None = None

    def of(self, store: Store) -> tuple[int, Statistics] | None:
        """(the last event it knows of, statistics): of now where that is quickly done, else older; None: not yet."""
        last = store.last_event()
        with self._lock:
            if self._running is None and (self._newest is None or self._newest[0] != last):
                self._running = last, self._pool.submit(_count, store, last)
            running = self._running
        if running is not None and wait([running[1]], timeout=_WAIT_S).done:
            with self._lock:
                if self._running is running:
                    self._running = None  # well or not: a store that was locked may be asked again
            found = running[1].result()
            with self._lock:
                self._newest = running[0], found
        return self._newest


def _count(store: Store, last: int) -> Statistics:
    """A page makes dozens of short calls that let go of the interpreter (SQLite, files): beside a thread that computes,
    each would wait Python's usual 5 ms to get it back."""
    sys.setswitchinterval(0.0002)
    try:
        return agreement(store.labels(as_of=last)), judge_quality(store.labels(Filters(judges=True), as_of=last))
    finally:
        sys.setswitchinterval(_USUAL_S)


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()
    computed = Computed()

    @router.get("/agreement")
    def page(request: Request) -> HTMLResponse:
        store = studio.labels() if studio.has_labels else None
        found = computed.of(store) if store else None
        last, (people, judges) = found or (0, (None, ()))
        return studio.page(
            request, "agreement.html.j2", overview=store.overview() if store else None, found=people, judges=judges,
            behind=store.last_event() - last if store and found else 0, models=reward_models(studio),
        )  # fmt: skip

    @router.get("/agreement/{name}.jsonl")
    def export(name: Literal["preferences", "events"]) -> StreamingResponse:
        read = Store.preference_rows if name == "preferences" else Store.events
        lines = (json.dumps(row) + "\n" for row in (read(studio.labels()) if studio.has_labels else ()))
        headers = {"content-disposition": f"attachment; filename={name}.jsonl"}
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    return router


def reward_models(studio: Studio) -> list[dict[str, Any]]:
    """name and held-out accuracy of the newest reward models below the folder; a damaged report is passed over."""
    found: list[tuple[float, dict[str, Any]]] = []
    for run_id in studio.runs.all():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RunError):
            run = studio.runs.open(run_id)
            path = run.path / "reward_report.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            shown = {key: float(content["accuracy"][key]) for key in ("low", "value", "high")}
            row = {"id": run_id, "name": studio.runs.name(run), "pairs": content["test_pairs"], "accuracy": shown}
            found.append((path.stat().st_mtime, row))
    return [row for _, row in sorted(found, key=lambda f: -f[0])[:_MOST_REWARD_RUNS]]
