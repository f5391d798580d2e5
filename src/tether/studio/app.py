"""The application: pages, templates, static files, and the guard before them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from tether.errors import LabelError, RunError, StoreError, TetherError
from tether.studio import agreement, compare, label, security, tokens, watch
from tether.studio import playground as talk
from tether.studio.shared import Studio

_HERE = Path(__file__).parent
_OPEN = {"/sign-in", "/static/studio.css"}


def create_app(studio: Studio) -> security.App:
    """The ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # The label page first: it is asked for most, and routes are tried in order.
    for pages in (label, watch, tokens, compare, agreement, talk):
        app.include_router(pages.routes(studio))

    @app.get("/")
    def home(request: Request) -> RedirectResponse:
        return RedirectResponse("/runs" if request.scope["state"]["owner"] else "/label")

    @app.get("/sign-in")
    def follow_link(request: Request, token: str = "") -> Response:
        return _signed_in(request, token)

    @app.post("/sign-in")
    def sign_in(request: Request) -> Response:  # a users token stays out of the URL
        return _signed_in(request, request.scope["state"]["form"].get("token", ""))

    def _signed_in(request: Request, token: str) -> Response:
        session = studio.gate.redeem(token) if token else None
        if session is None:
            why = "This link was used before, or is of another start of the studio. Take a new one from its terminal."
            return _refusal(request, 401, why if token else "")
        # Not a redirect: where the link was followed from another site, the browser would not send the cookie along it.
        response = studio.page(request, "welcome.html.j2")
        name = security.cookie_name(request.headers["host"])
        response.set_cookie(name, session, httponly=True, samesite="strict", path="/")
        return response

    @app.get("/static/{name}")
    def static(request: Request, name: str) -> Response:
        found = _static_files().get(name)
        if found is None:
            return _refusal(request, 404, f"there is no file {name[:40]!r}")
        content, kind, tag = found
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        return Response(content, media_type=kind, headers={"etag": tag, "cache-control": "private, max-age=60"})

    def _refusal(request: Request, status: int, why: str) -> HTMLResponse:
        return studio.page(request, "refused.html.j2", status, why=why, code=status)

    @app.exception_handler(TetherError)
    def on_error(request: Request, error: TetherError) -> HTMLResponse:
        kinds = {LabelError: 400, StoreError: 503, RunError: 404}  # 503: locked, or its disk is full
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), 400)
        return _refusal(request, code, str(error))

    @app.exception_handler(RequestValidationError)
    def on_nonsense(request: Request, error: RequestValidationError) -> HTMLResponse:
        return _refusal(request, 404, "This address or form holds something that is not what it should be.")

    @app.exception_handler(404)
    def on_nothing(request: Request, error: Exception) -> HTMLResponse:
        return _refusal(request, 404, "There is no such page.")

    @app.exception_handler(500)
    def on_failure(request: Request, error: Exception) -> HTMLResponse:
        return _refusal(request, 500, f"The studio failed here ({type(error).__name__}): its terminal says where.")

    def refuse(status: int, why: str) -> security.App:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            await _refusal(Request(scope), status, why)(scope, receive, send)

        return answer

    return security.Guard(app, studio.gate, refuse, _OPEN)


# ---------------------------------------------------------------- files


_KINDS = {".css": "text/css", ".js": "text/javascript"}


@cache
def _static_files() -> dict[str, tuple[bytes, str, str]]:
    """name -> (content, media type, etag): everything that a page may ask for, and nothing else."""
    from plotly.offline import get_plotlyjs

    paths = [
        *sorted((_HERE / "static").iterdir()),
        *(_HERE.parent / "reports" / name for name in ("tokens.css", "paint.js")),
    ]
    files: dict[str, Callable[[], bytes]] = {path.name: path.read_bytes for path in paths}
    files["plotly.js"] = lambda: get_plotlyjs().encode()
    found = {}
    for name, read in files.items():
        content = read()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found[name] = content, _KINDS[Path(name).suffix], tag
    return found
