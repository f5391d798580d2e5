"""An OpenAI-compatible endpoint on loopback that rates answers at random: asked twice, it says something else."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse


class ScriptedRater:
    """An ASGI application for `served_rewards.listening`.

    kill_at: of requests, from 1, the one at which it kills `client`, unanswered. status: of a request's number, from 0.
    reply: what it says; None: a digit by a draw of its own for each time that it is asked the same.
    """

    def __init__(
        self, kill_at: int = 0, *, reply: str | None = None, status: Callable[[int], int] = lambda n: 200
    ) -> None:
        self.kill_at, self.reply, self.status = kill_at, reply, status
        self.client = 0
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()  # by body

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        body = json.loads(await request.body())
        self.asked.append(body)
        if self.client and len(self.asked) == self.kill_at:
            os.kill(self.client, signal.SIGKILL)
            return
        status = self.status(len(self.asked) - 1)
        if status != 200:
            await JSONResponse({"error": {"message": "not now"}}, status)(scope, receive, send)
            return
        key = json.dumps(body, sort_keys=True)
        self.answered[key] += 1
        text = self.reply or f"Well.\nRATING: {Random(f'{key} {self.answered[key]}').randrange(10)}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = {"choices": [choice], "usage": {"total_tokens": 100}}
        await JSONResponse(answer)(scope, receive, send)
