"""Templates and JSON for pages that show untrusted text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tether.reports.text import visible


def templates(folder: Path, **filters: Callable[..., str]) -> jinja2.Environment:
    """The templates of a folder: every value is escaped, and its hidden characters are shown."""
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )  # fmt: skip
    environment.filters |= filters
    return environment


def safe_json(value: Any) -> Markup:
    """JSON for inside a script element or an event: no character of it ends the element or line, or opens a comment."""
    return Markup(json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
