"""The list of runs, and one run with its curves, live."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from markupsafe import Markup

from tether.diagnose.alarms import alarms
from tether.diagnose.diagnosis import preference_report
from tether.diagnose.state import PATIENCE_S, patience_s, state
from tether.errors import RunError
from tether.reports.curves import curves, shown
from tether.runs import Run
from tether.runs.resume import changes
from tether.runs.tail import lines_since, sample_lines
from tether.studio.index import RunRow
from tether.studio.shared import Studio, is_count, paged

_A_PAGE = 50  # runs
_POINTS = 1000  # of a curve; the alarms, too, are judged by so many lines, all of a shorter run
_RECENT = 200  # lines that say which curves there are
_MOST_OVERLAID = 6
_LOOK_EVERY_S = 1.0
Cursor = Annotated[int, Query(ge=0, lt=2**62)]  # bytes of metrics.jsonl


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()

    @router.get("/runs")
    def runs(request: Request, page: int = 1, find: str = "") -> HTMLResponse:
        ids = [run_id for run_id, name in studio.runs.all().items() if find.lower() in name.lower()]
        shown, page, pages = paged(ids, page, _A_PAGE)
        return studio.page(
            request, "runs.html.j2", runs=[_row(studio, i) for i in shown], count=len(ids), page=page, pages=pages,
            find=find, root=studio.runs.given, spark=spark,
        )  # fmt: skip

    @router.get("/runs/differences")
    def differences(request: Request) -> HTMLResponse:
        ids = request.query_params.getlist("run")[:_MOST_OVERLAID]
        found = [studio.runs.open(i) for i in ids]
        return studio.page(
            request, "differences.html.j2", ids=ids, names=[studio.runs.name(r) for r in found], rows=differing(found)
        )

    @router.get("/runs/{run_id}")
    def run(request: Request, run_id: str) -> HTMLResponse:
        found = studio.runs.open(run_id)
        status = found.status
        lines, _ = sample_lines(found.path / "metrics.jsonl", _POINTS)
        config = found.config
        now = datetime.now(UTC)
        return studio.page(
            request, "run.html.j2", id=run_id, name=studio.runs.name(found), kind=found.kind,
            state=state(status, now, patience_s=patience_s(lines)), status=status, last=lines[-1] if lines else {},
            alarms=alarms(status["kind"], config, lines, found.events, status, now=now,
                          reward_report=preference_report(found)),
            curves=shown(status["kind"], config, lines[-_RECENT:]),
            cycles=found.rollout_cycles, evaluations=found.evaluation_cycles,
            others=[(i, studio.runs.name(studio.runs.open(i))) for i in _with(request) if i != run_id],
        )  # fmt: skip

    @router.get("/runs/{run_id}/curves")
    def curves_of(request: Request, run_id: str) -> JSONResponse:
        found = studio.runs.open(run_id)
        lines, cursor = sample_lines(found.path / "metrics.jsonl", _POINTS)
        overlaid = [studio.runs.open(i) for i in _with(request)]
        plots = _plots(found, lines)
        own = {metric: len(plot["data"]) for metric, plot in plots.items()}
        for number, other in enumerate(overlaid, 1):
            _overlay(plots, _plots(other, sample_lines(other.path / "metrics.jsonl", _POINTS)[0]), number)
        return JSONResponse({"plots": plots, "cursor": cursor, "own": own})

    @router.get("/runs/{run_id}/live")
    async def live(request: Request, run_id: str, cursor: Cursor = 0) -> StreamingResponse:
        found = studio.runs.open(run_id)
        seen = request.headers.get("last-event-id", "")
        start = int(seen) if is_count(seen) else cursor
        return StreamingResponse(_stream(request, found, start), media_type="text/event-stream")

    return router


def _with(request: Request) -> list[str]:
    return request.query_params.getlist("with")[: _MOST_OVERLAID - 1]


async def _stream(request: Request, run: Run, cursor: int) -> AsyncIterator[str]:
    """Server-sent events: `lines` with the points that are new, `restart` where the file got shorter, `state`."""
    shown_state, patience = "", PATIENCE_S
    while not await request.is_disconnected():
        found = await asyncio.to_thread(lines_since, run.path / "metrics.jsonl", cursor)
        if found is None:
            yield "event: restart\ndata: {}\n\n"
            return
        lines, cursor = found
        patience = max(patience, patience_s(lines))
        if lines:
            content = {"plots": await asyncio.to_thread(_plots, run, lines), "last": lines[-1]}
            yield f"id: {cursor}\nevent: lines\ndata: {json.dumps(content)}\n\n"
        now = state(run.status, datetime.now(UTC), patience_s=patience)
        if now != shown_state:
            shown_state = now
            yield f"event: state\ndata: {json.dumps(now)}\n\n"
        await asyncio.sleep(_LOOK_EVERY_S)


def _plots(run: Run, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """metric -> plot."""
    return {c.metric: plot for c, plot in curves(run.status["kind"], run.config, lines)}


_COLORS = ["--second", "--third", "--fourth", "--fifth", "--sixth"]


def _overlay(plots: dict[str, Any], others: dict[str, Any], number: int) -> None:
    """Draw another run's lines into the plots that both have; without its band."""
    for metric, plot in others.items():
        if metric in plots:
            line = plot["data"][-1]
            line |= {"line": {"color": _COLORS[number - 1], "width": 1.5}, "mode": "lines"}
            plots[metric]["data"].append(line)
            ranges = [p["layout"]["yaxis"]["range"] for p in (plots[metric], plot)]
            plots[metric]["layout"]["yaxis"]["range"] = [min(r[0] for r in ranges), max(r[1] for r in ranges)]


def _row(studio: Studio, run_id: str) -> RunRow | str:
    """A run's row, or what is wrong with it: one damaged run must not hide the others."""
    try:
        return studio.runs.row(run_id)
    except RunError as error:
        return str(error)


def differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(dotted key, its value in every run) of the config keys that are not the same everywhere."""
    trees = [asdict(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in trees[1:] for key, _, _ in changes(trees[0], tree))
    leaves = [{key: value for key, _, value in changes({}, tree)} for tree in trees]
    return [(key, [found.get(key, "(absent)") for found in leaves]) for key in keys]


def spark(values: Sequence[float | None], width: int = 120, height: int = 28) -> Markup:
    """A small curve as SVG: nothing but numbers."""
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    if len(known) < 2:
        return Markup("")
    low, high = min(v for _, v in known), max(v for _, v in known)
    scale = (height - 4) / ((high - low) or 1.0)
    step = width / max(1, len(values) - 1)
    points = " ".join(f"{i * step:.1f},{height - 2 - (v - low) * scale:.1f}" for i, v in known)
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )
