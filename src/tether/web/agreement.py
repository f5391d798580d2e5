"""How far the labels can be trusted: agreement, habits, gold, and the reward model beside the human ceiling."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookLonger
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from tether.preferences.agreement import Agreement, agreement
from tether.preferences.store import Store
from tether.web.studio import Studio

_WAIT_S = 0.1
_MOST_REWARD_RUNS = 8


class Computed:
    """The statistics of the newest labels, computed beside the pages: a million labels take longer than a page may."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="agreement")
        self._of: int | None = None
        self._running: Future[Agreement] | None = None
        self._newest: tuple[int, Agreement] | None = None

    def of(self, store: Store) -> tuple[int, Agreement] | None:
        """(the last event it knows of, statistics): of now where that is quickly done, else older; None: not yet."""
        last = store.last_event()
        if self._newest and self._newest[0] == last:
            return self._newest
        if self._running is None or (self._running.done() and self._of != last):
            self._of, self._running = last, self._pool.submit(lambda: agreement(store.labels()))
        try:
            self._newest = self._of or 0, self._running.result(timeout=_WAIT_S)
            self._running = None
        except TookLonger:
            pass
        return self._newest


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()
    computed = Computed()

    @router.get("/agreement")
    def page(request: Request) -> HTMLResponse:
        there = studio.labels.there
        store = studio.labels() if there else None
        found = computed.of(store) if store else None
        return studio.page(
            request, "agreement.html.j2", overview=store.overview() if store else None,
            found=found[1] if found else None, behind=store.last_event() - found[0] if store and found else 0,
            models=reward_models(studio),
        )  # fmt: skip

    @router.get("/agreement/preferences.jsonl")
    def export() -> StreamingResponse:
        rows = studio.labels().preference_rows() if studio.labels.there else []
        lines = (json.dumps(row) + "\n" for row in rows)
        headers = {"content-disposition": "attachment; filename=preferences.jsonl"}
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    @router.get("/agreement/events.jsonl")
    def events() -> StreamingResponse:
        found = studio.labels().events() if studio.labels.there else iter(())
        lines = (json.dumps(event) + "\n" for event in found)
        headers = {"content-disposition": "attachment; filename=events.jsonl"}
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    return router


def reward_models(studio: Studio) -> list[dict[str, Any]]:
    """name and held-out accuracy of the reward models below the folder."""
    found: list[dict[str, Any]] = []
    for run_id in studio.runs.all():
        run = studio.runs.open(run_id)
        path = run.path / "reward_report.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append({"id": run_id, "name": studio.runs.name(run), "pairs": content["test_pairs"],
                          "accuracy": content["accuracy"]})  # fmt: skip
            if len(found) == _MOST_REWARD_RUNS:
                break
    return found
