"""The HTTP side of a served reward model.

POST /score    {"prompts": […], "completions": […]} → {"scores": [number or null, …]}, see docs/serving.md
GET  /health   what is served: name, normalization, hash of the tokenizer, limits

token     every request carries it (Authorization: Bearer …); it is compared before a byte of the body is read
bodies    end at `most_bytes`, and have to arrive within a minute
requests  are scored one after the other, each as a batch of its own: merged with others, the sums of a row would be
          rounded differently, and its score would depend on who else asks
waiting   at most `most_waiting`; further ones are sent away with 503 and Retry-After
keys      a request with an Idempotency-Key that was seen before gets that one's answer, or waits for it
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import traceback
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from tether.errors import TetherError
from tether.serving.scoring import ServedModel, read_request

_BODY_S = 60.0  # for a body to arrive
_REMEMBERED = 256  # answers by idempotency key


@dataclass(frozen=True)
class Limits:
    """Of one server."""

    most_rows: int = 8192
    """Answers in one request."""
    most_bytes: int = 128_000_000
    """Of a request's body."""
    most_waiting: int = 32
    """Requests that are scored or wait for it."""


class _Refused(Exception):
    def __init__(self, status: int, why: str, **headers: str) -> None:
        self.status, self.why, self.headers = status, why, headers


def create_app(model: ServedModel, *, token: str, limits: Limits) -> ASGIApp:
    """The ASGI application. token: what a client must show."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(1, thread_name_prefix="score")  # one model, so one request at a time
    answers: OrderedDict[str, tuple[bytes, asyncio.Task[list[float | None]]]] = OrderedDict()
    tasks: set[asyncio.Task[list[float | None]]] = set()  # asyncio itself holds only weak references

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse(model.health() | {"limits": vars(limits)})

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        body = await _read_body(request, limits.most_bytes)
        digest = hashlib.sha256(body).digest()
        key = request.headers.get("idempotency-key", "")
        known, task = answers.get(key, (digest, None)) if key else (digest, None)
        if known != digest:
            raise _Refused(422, "this Idempotency-Key was used for another body: take a new one for each request")
        if task is None:
            if len(tasks) >= limits.most_waiting:
                raise _Refused(503, f"{len(tasks)} requests wait already", **{"retry-after": "1"})
            task = asyncio.create_task(_score(body))
            tasks.add(task)
            task.add_done_callback(lambda done: _over(done, key))
            if key:
                answers[key] = digest, task
        # Shielded: a client that hangs up comes back with the same key, for the same answer.
        try:
            return JSONResponse({"scores": await asyncio.shield(task)})
        except TetherError as error:
            raise _Refused(422, str(error)) from error
        except Exception as error:
            traceback.print_exc()
            why = f"the server failed here ({type(error).__name__}): its terminal says where"
            raise _Refused(500, why) from error

    async def _score(body: bytes) -> list[float | None]:
        loop = asyncio.get_running_loop()
        asked = await asyncio.to_thread(read_request, body, limits.most_rows)
        return await loop.run_in_executor(worker, model.score, asked)

    def _over(task: asyncio.Task[list[float | None]], key: str) -> None:
        tasks.discard(task)
        if task.cancelled() or task.exception() is not None:  # what failed is tried anew
            answers.pop(key, None)
        finished = [k for k, (_, other) in answers.items() if other.done()]
        for old in finished[: max(0, len(finished) - _REMEMBERED)]:
            del answers[old]

    @app.exception_handler(_Refused)
    def refused(_: Request, error: _Refused) -> JSONResponse:
        return JSONResponse({"detail": error.why}, error.status, error.headers)

    return _Guard(app, token)


class _Guard:
    """The middleware: `app` is reached with the token alone."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                why = "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`"
                refusal = JSONResponse({"detail": why}, 401, {"www-authenticate": "Bearer", "connection": "close"})
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _read_body(request: Request, most_bytes: int) -> bytes:
    too_long = _Refused(413, f"more than {most_bytes:,} bytes: send fewer rows in one request", connection="close")
    if int(request.headers.get("content-length") or 0) > most_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise too_long
    except TimeoutError:
        raise _Refused(408, f"the body did not arrive within {_BODY_S:g} seconds", connection="close") from None
    except ClientDisconnect:
        raise _Refused(400, "the body broke off") from None
    return bytes(body)
