"""What the pages share: the runs, the store of labels, the gate, and the templates."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from tether.feedback.store import Store
from tether.reports.html import templates
from tether.studio.index import Runs
from tether.studio.security import Gate

Row = TypeVar("Row")


@dataclass
class Studio:
    """What the pages share.

    runs    the runs below a folder.
    store   path of the preference store; it is made when the first label page is opened.
    gate    who may come in.
    busy_s  seconds that a write waits for another process before its page says that the store is locked.
    device  what "Try it" runs its models on: a device of torch.
    """

    runs: Runs
    store: Path
    gate: Gate
    busy_s: float = 5.0
    device: str = "cpu"
    _open: Store | None = field(default=None, init=False)
    _opening: Lock = field(default_factory=Lock, init=False, repr=False)

    def labels(self) -> Store:
        """The store, opened when it is first needed."""
        with self._opening:
            if self._open is None:
                self._open = Store(self.store, busy_s=self.busy_s)
            return self._open

    @property
    def has_labels(self) -> bool:
        """Whether anything was ever put into the store."""
        return self._open is not None or self.store.exists()

    def page(self, request: Request, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
        """A page from its template."""
        values |= {"person": "", "owner": False, "form_token": ""} | request.scope.get("state", {})
        html = _templates().get_template(template).render(values, path=request.url.path)
        return HTMLResponse(html.encode("utf-8", "backslashreplace"), status_code)


# ---------------------------------------------------------------- templates


@lru_cache(maxsize=64)
def part(template: str, **values: Hashable) -> Markup:
    """A piece of a page that follows from `values` alone: rendered once."""
    return Markup(_templates().get_template(template).render(**values))


@cache
def _templates() -> jinja2.Environment:
    return templates(Path(__file__).parent / "templates", number=number)


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it; – for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def paged(rows: Sequence[Row], page: int, size: int) -> tuple[Sequence[Row], int, int]:
    """(the rows of a page, its number, how many pages there are); beyond the first or last page, that one."""
    pages = max(1, -(-len(rows) // size))
    page = min(max(page, 1), pages)
    return rows[(page - 1) * size : page * size], page, pages


def is_count(text: str) -> bool:
    """Whether a browser's text is a number from 0 on that a file of ours could hold: str.isdigit() takes ² too."""
    return re.fullmatch(r"[0-9]{1,15}", text) is not None
