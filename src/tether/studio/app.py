"""The application: pages, templates, static files, and the guard before them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tether.errors import LabelError, RunError, StoreError, TetherError
from tether.studio import agreement, compare, label, revisions, security, tokens, watch
from tether.studio import playground as talk
from tether.studio.shared import Studio

_OPEN = {"/sign-in", "/static/studio.css"}
_FOLDERS: list[str | tuple[str, str]] = [(f"tether.{room}", "static") for room in ("studio", "reports")]
_CODES = {LabelError: 400, StoreError: 503, RunError: 404}  # 503: locked, or its disk is full


def create_app(studio: Studio) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # The label page first: it is asked for most, and routes are tried in order.
    for pages in (label, watch, tokens, compare, agreement, revisions, talk):
        app.include_router(pages.routes(studio))

    @app.get("/")
    def home(request: Request) -> RedirectResponse:
        return RedirectResponse("/runs" if request.state.owner else "/label")

    @app.api_route("/sign-in", methods=["GET", "POST"])
    def sign_in(request: Request, token: str = "") -> Response:
        if request.method == "POST":  # a users token stays out of the URL
            token = request.state.form.get("token", "")
        session = studio.gate.redeem(token) if token else None
        if session is None:
            why = "This link was used before, or is of another start of the studio. Take a new one from its terminal."
            return _refusal(request, 401, why if token else "")
        # Not a redirect: where the link was followed from another site, the browser would not send the cookie along it.
        response = studio.page(request, "welcome.html.j2")
        name = security.cookie_name(request.headers["host"])
        response.set_cookie(name, session, httponly=True, samesite="strict", path="/")
        return response

    app.mount("/static", _Static(packages=[*_FOLDERS, ("plotly", "package_data")]))

    def _refusal(request: Request, status: int, why: str) -> HTMLResponse:
        return studio.page(request, "refused.html.j2", status, why=why, code=status)

    def on_error(request: Request, error: Exception) -> HTMLResponse:
        if isinstance(error, TetherError):
            return _refusal(request, _CODES.get(type(error), 400), str(error))
        if isinstance(error, RequestValidationError):
            return _refusal(request, 404, "This address or form holds something that is not what it should be.")
        if isinstance(error, HTTPException):
            return _refusal(request, 404, "There is no such page.")
        return _refusal(request, 500, f"The studio failed here ({type(error).__name__}): its terminal says where.")

    for kind in (TetherError, RequestValidationError, 404, 500):
        app.add_exception_handler(kind, on_error)

    def refuse(status: int, why: str) -> ASGIApp:
        return lambda scope, receive, send: _refusal(Request(scope), status, why)(scope, receive, send)

    return security.Guard(app, studio.gate, refuse, _OPEN)


class _Static(StaticFiles):
    """Files that a browser asks for again after a minute: another tether may have been installed."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["cache-control"] = "private, max-age=60"
        return response
