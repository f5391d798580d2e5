"""A studio served for real on loopback, and pages of a browser that may reach nothing else."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import httpx
import uvicorn

from tether.studio.app import create_app
from tether.studio.index import Runs
from tether.studio.security import Gate
from tether.studio.shared import Studio

_tokens: WeakKeyDictionary[httpx.Client, str] = WeakKeyDictionary()


@dataclass
class Served:
    """A studio that answers on a loopback port."""

    url: str
    gate: Gate
    root: Path
    store: Path
    foreign: list[str] = field(default_factory=list)  # requests of the browser to anywhere else

    def link(self, person: str = "Ada") -> str:
        return f"{self.url}/sign-in?token={self.gate.link(person)}"

    def client(self, person: str = "Ada") -> httpx.Client:
        client = httpx.Client(base_url=self.url, follow_redirects=True, timeout=30)
        assert client.get(f"/sign-in?token={self.gate.link(person)}").status_code == 200
        _tokens[client] = self.gate.form_token(person)
        return client


def form_token(client: httpx.Client) -> str:
    """What the forms on this client's pages carry."""
    return _tokens[client]


def serve(root: Path, store: Path, busy_s: float = 5.0, device: str = "cpu", **gate) -> Iterator[Served]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        opened = Gate({"127.0.0.1", "localhost"}, **{"owners": {"Ada", "Ben"}, **gate})
        app = create_app(Studio(Runs(root), store, opened, busy_s, device))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{port}", opened, root, store)
        server.should_exit = True
        thread.join(10)


def opened(browser, studio: Served, **options):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    problems: list[str] = []

    def route(handler):
        if handler.request.url.startswith((studio.url, "data:")):
            handler.continue_()
        else:
            studio.foreign.append(handler.request.url)
            handler.abort()

    context.route("**/*", route)
    found = context.new_page()
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    found.goto(studio.link())
    found.wait_for_url("**/runs")
    yield found
    context.close()
    assert studio.foreign == []
    assert problems == []
