"""What `tether revise` wrote: prompt, answer, critiques under their principles, and what each revision changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from tether.errors import RunError
from tether.feedback.chain_file import is_chain_file, read, starts
from tether.reports.text import prompt_text, visible
from tether.studio.compare import differences
from tether.studio.shared import Studio, paged

_A_PAGE = 10  # chains
_DEEPEST = 4  # folders below the root in which files are looked for


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()

    @router.get("/revisions")
    def files(request: Request) -> HTMLResponse:
        root = studio.runs.root
        listed = [
            {"id": its_id, "name": str(path.relative_to(root)), "rows": len(_starts(path)) - 1}
            for its_id, path in chain_files(root).items()
        ]
        return studio.page(request, "revisions.html.j2", files=listed, root=studio.runs.given)

    @router.get("/revisions/{its_id}")
    def chains(request: Request, its_id: str, page: int = 1) -> HTMLResponse:
        path = chain_files(studio.runs.root).get(its_id)
        if path is None:
            raise RunError(f"there are no revisions {its_id[:40]!r} below {studio.runs.given}: moved or deleted.")
        places = _starts(path)
        shown, page, pages = paged(range(len(places) - 1), page, _A_PAGE)
        rows = list(read(path, places[shown[0] : shown[-1] + 2])) if shown else []
        return studio.page(
            request, "chains.html.j2", id=its_id, name=str(path.relative_to(studio.runs.root)), count=len(places) - 1,
            chains=[_chain(number, row) for number, row in zip(shown, rows, strict=True)],
            model=_model(rows), page=page, pages=pages,
        )  # fmt: skip

    return router


def chain_files(root: Path) -> dict[str, Path]:
    """The files of chains below `root`, by an id that we made: no path ever comes from a browser."""
    found = sorted(_below(root, _DEEPEST))
    return {hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]: path for path in found}


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if {"config.yaml", "status.json"} <= {entry.name for entry in entries}:
        return  # a run, which has pages of its own
    for entry in entries:
        path = Path(entry.path)
        if entry.name.endswith(".jsonl") and entry.is_file(follow_symlinks=False) and is_chain_file(path):
            yield path
        elif depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(path, depth - 1)


def _starts(path: Path) -> list[int]:
    try:
        status = path.stat()
        return _starts_of(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise RunError(f"{path.name} cannot be read ({error.strerror}): it was moved or deleted.") from error


@lru_cache(maxsize=8)
def _starts_of(path: Path, *_: int) -> list[int]:
    """`starts`, kept while the file is the same."""
    return starts(path)


def _model(rows: list[dict[str, Any]]) -> str:
    """Who wrote them; all rows of a file have the same."""
    made_by = rows[0].get("made_by") if rows else None
    return visible(made_by.get("model", "")) if isinstance(made_by, dict) else ""


def _chain(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A chain as its template shows it; revisions are marked where they differ from what they revise."""
    if not row:
        return {"number": number + 1, "damaged": True}
    prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
    first, *others = row["chain"]
    rounds, before = [], first["text"]
    for critique, revision in zip(others[::2], others[1::2], strict=False):
        after = revision["text"]
        rounds.append(
            {
                "principle": visible(critique.get("principle") or ""), "critique": visible(critique["text"]),
                "revision": differences(before, after)[1], "same": before.strip() == after.strip(),
            }
        )  # fmt: skip
        before = after
    answer = differences(first["text"], others[1]["text"])[0] if len(others) > 1 else visible(first["text"])
    return {
        "number": number + 1, "prompt": visible(prompt_text(prompt)), "answer": answer, "given": bool(row.get("given")),
        "rounds": rounds, "damaged": False,
    }  # fmt: skip
