"""Servers of rewards on loopback: `tether serve` itself, in a thread or a process, and scripted ones."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tether.data.tokenizer import load_tokenizer
from tether.models.reward_model import init_reward_model, save_reward_model
from tether.serving.app import Limits, create_app
from tether.serving.scoring import ServedModel

TOKEN = "the-token-of-these-tests-0123456789"


def make_reward_model(directory: Path, policy: Path, *, stop_id: int = 1, seed: int = 0) -> Path:
    """A random reward model with the policy's architecture and tokenizer, mean .5 and std 2."""
    device = torch.device("cpu")
    model = init_reward_model(str(policy), dtype=torch.float32, weights_dtype=torch.float32, device=device, seed=seed)
    model.mean, model.std = 0.5, 2.0
    save_reward_model(model, load_tokenizer(str(policy)), directory, stop_id=stop_id)
    return directory


@contextmanager
def listening(app, port: int = 0) -> Iterator[str]:
    """An ASGI application on a loopback port: its address."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def serving(
    model: Path | ServedModel, *, token: str = TOKEN, around: Callable = lambda app: app, **limits
) -> Iterator[str]:
    """`tether serve` of a reward model, in a thread. around: a middleware."""
    if isinstance(model, Path):
        model = ServedModel(str(model), dtype="auto", device="cpu")
    with listening(around(create_app(model, token=token, limits=Limits(**limits)))) as url:
        yield url


@dataclass
class Flapping:
    """A middleware with faults by a counted draw: some requests get 503, some are answered long after anybody waits."""

    app: Callable
    seed: int = 0
    busy: float = 0.1
    late: float = 0.05
    late_s: float = 3.0
    count: int = 0
    faults: list[str] = field(default_factory=list)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            self.count += 1
            draw = Random(f"{self.seed} {self.count}").random()
            if draw < self.busy:
                self.faults.append("503")
                await JSONResponse({"detail": "busy"}, 503)(scope, receive, send)
                return
            if draw < self.busy + self.late:
                self.faults.append("late")
                await asyncio.sleep(self.late_s)
        await self.app(scope, receive, send)


class Scripted:
    """An endpoint of somebody else's: answers what it is told to, and remembers what it was asked.

    answer: a body, or a function from a request's body to scores. statuses: of the first requests; then 200.
    drip_s: seconds between one byte of the body and the next.
    """

    def __init__(self, answer, *, statuses=(), drip_s=0.0, threaded=False) -> None:
        self.answer, self.statuses, self.drip_s, self.threaded = answer, list(statuses), drip_s, threaded
        self.asked: list[tuple[dict, dict]] = []

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        request = Request(scope, receive)
        body = json.loads(await request.body())
        self.asked.append((dict(request.headers), body))
        status = self.statuses.pop(0) if self.statuses else 200
        answer = self.answer
        if callable(answer):
            answer = {"scores": await asyncio.to_thread(answer, body) if self.threaded else answer(body)}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

        async def dripping():
            for i in range(len(content)):
                yield content[i : i + 1]
                await asyncio.sleep(self.drip_s)

        response = StreamingResponse(dripping(), status) if self.drip_s else Response(content, status)
        await response(scope, receive, send)


@contextmanager
def serving_process(directory: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen, str]]:
    """`tether serve` as a user starts it: the process, and the URL that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tether", "serve", str(directory), "--port", str(port), "--token-env", "SERVED_TOKEN"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SERVED_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        yield process, re.search(r"http://\S+", first)[0]
    finally:
        process.kill()
        process.wait()
