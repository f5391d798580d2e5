"""Collecting preferences: one pair (or several answers to rank) at a time, by keyboard, saved as they are given.

The pages are plain forms: each button names a side of the screen, and the form holds a key made with the page, so that
a form sent twice records once. Only the store knows which answer was on which side: the better answer of a gold item is
often stored first, and a page that told the stored order would tell the answer. The script only presses the buttons.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from tether.errors import LabelError
from tether.feedback.records import AXES, RANKING, Answer, Item, prompt_of
from tether.feedback.store import Store
from tether.reports.text import prompt_text
from tether.studio.answers import answer
from tether.studio.shared import Studio, is_count, part

STRENGTHS = ((3, "much"), (2, "clearly"), (1, "slightly"))
_TIME = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")  # seconds since 1970
_LONGEST_S = 3600.0  # beyond it, a page was left open, and nobody was thinking


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()
    store = studio.labels
    registered: set[str] = set()  # in the store, as far as this process knows

    @router.get("/label")
    def label(request: Request, done: str = "") -> HTMLResponse:
        person, owner = request.state.person, request.state.owner
        if not studio.has_labels:
            return studio.page(request, "label.html.j2", task=None, progress=None, overview=None, done=done)
        labels = store()
        if person not in registered:
            labels.add_annotator(person)
            registered.add(person)
        task = labels.next_task(person)
        return studio.page(
            request, "label.html.j2", task=task, prompt=_shown(task.prompt) if task else "",
            choices=part("choices.html.j2", kind=task.kind, axes=AXES, strengths=STRENGTHS) if task else None,
            guideline=labels.guideline(task.guideline) if task and task.guideline else None,
            progress=labels.progress(person), overview=labels.overview() if owner or not task else None,
            key=str(uuid4()), undo_key=str(uuid4()), now=time.time(), done=done,
        )  # fmt: skip

    @router.post("/label")
    def record(request: Request) -> Response:
        record_form(store(), request.state.person, request.state.form)
        return RedirectResponse("/label?done=saved", 303)

    @router.post("/label/undo")
    def undo(request: Request) -> Response:
        person, labels = request.state.person, store()
        undone = labels.undo(person, key=request.state.form.get("key", ""))
        if undone is None:
            return RedirectResponse("/label?done=nothing", 303)
        task = labels.next_task(person)
        return RedirectResponse(f"/label?done={'undone' if task and task.item == undone.item else 'elsewhere'}", 303)

    @router.post("/queue")
    def queue(request: Request) -> Response:
        rows = [answer(studio, request.state.form.get(name, "")) for name in ("a", "b")]
        if rows[0][1]["prompt"] != rows[1][1]["prompt"]:
            raise LabelError("these two answer different prompts: nobody could say which is better. Choose two of one.")
        if rows[0][1]["completion"] == rows[1][1]["completion"]:
            raise LabelError("these two answers are the same: neither could be better. Choose two that differ.")
        answers = tuple(Answer(row["completion"], source, row["finish_reason"]) for source, row in rows)
        added = store().add_items(
            [Item(prompt_of(rows[0][1]["prompt"]), answers, source={"from": "studio"})], overlap=0.0, first=True
        )
        return RedirectResponse(f"/label?done={'queued' if added.new else 'known'}", 303)

    return router


def record_form(store: Store, person: str, form: dict[str, str]) -> None:
    """What a form of the label page says, into the store; LabelError where it cannot be meant."""
    item, seen = form.get("item", ""), form.get("seen", "")
    if not is_count(item):
        raise LabelError(f"item={item[:20]!r} is not a number: nothing was saved. Reload the page.")
    value, _, strength = form.get("choice", "").partition(":")
    choice = _ranking(form) if value == RANKING else _choice_of(value)
    axes = {axis: _choice_of(form[f"axis_{axis}"]) for axis in AXES if form.get(f"axis_{axis}")}
    seconds = max(0.0, time.time() - float(seen)) if _TIME.fullmatch(seen) else None
    store.record(
        person, int(item), key=form.get("key", ""), choice=choice, on_screen=True,
        strength=int(strength) if is_count(strength) else None, axes=axes if choice != "skip" else {},
        note=form.get("note", "").strip() or None,
        reason=form.get("reason", "").strip() or None if choice == "skip" else None,
        seconds=None if seconds is None else min(seconds, _LONGEST_S),
    )  # fmt: skip


def _ranking(form: dict[str, str]) -> list[int]:
    """Positions on the page, best answer first, from rank_0 … rank_K-1: the rank given to the answer at each."""
    ranks = {
        int(name.removeprefix("rank_")): int(rank)
        for name, rank in form.items()
        if name.startswith("rank_") and is_count(name.removeprefix("rank_")) and is_count(rank)
    }
    if sorted(ranks.values()) != list(range(1, len(ranks) + 1)):
        raise LabelError("two answers have the same place: nothing was saved. Go back and give each its own.")
    return sorted(ranks, key=ranks.__getitem__)


def _choice_of(value: str) -> str:
    """A form's word as the store has it, where a is the answer on the left; LabelError for what no form holds."""
    if value in ("a", "b"):
        raise LabelError(f"{value!r} is no choice of this page: nothing was saved. Reload the page and choose a side.")
    return {"left": "a", "right": "b"}.get(value, value)


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt_text(json.dumps(prompt))
