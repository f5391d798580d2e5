"""`tether studio`: start the server, print the links that sign people in."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
import threading
from importlib import import_module
from pathlib import Path

from tether.errors import ConfigError
from tether.studio.index import Runs
from tether.studio.security import Gate

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def main(
    folder: Path, *, store: Path, host: str = "127.0.0.1", port: int = 8765, users: Path | None = None,
    owners: list[str] | None = None, people: list[str] | None = None, names: list[str] | None = None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Serve the pages until interrupted.

    folder: runs are looked for below it. store: the preference store, made when it is needed.
    host: an address to listen on; any but this machine's own needs `users`. port: 0 takes a free one.
    people: who gets a one-time link to label, and to nothing else. Whoever is logged in here is the owner, and gets one
        to every page.
    users: instead of links, a JSON file {"name": "token", …}, each token of 20 characters or more; owners: who of them
        may see every page.
    names: that browsers may call this machine by too.
    device: what "Try it" runs its models on.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is loaded: no request leaves this machine
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, so the studio has no server: pip install 'tether[studio]'."
        ) from error

    from tether.studio.app import create_app
    from tether.studio.shared import Studio

    if not 0 <= port < 2**16:
        raise ConfigError(
            f"--port {port} is not a port: nothing could listen there. Give 1 to 65535, or 0 for a free one."
        )
    known = read_users(users) if users else {}
    if host not in _LOOPBACK and not known:
        raise ConfigError(
            f"--host {host} would show the runs to everyone who can reach this machine. Give --users FILE with a token "
            "for each person, or leave --host away."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory: there would be no runs to show. Name the folder they are in.")
    _check_people(set(known.values()) if users else None, owners or [], people or [])
    owner = _whoever_this_is()
    called = {name.lower() for name in (*_LOOPBACK, host, *(names or []))}
    gate = Gate(called | {f"[{name}]" for name in called if ":" in name}, set(owners or []) or {owner}, users=known)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(128)  # before the link is printed: whoever opens it at once waits, and is answered
        except OSError as error:
            raise ConfigError(
                f"--port {port} on {host} cannot be listened on ({error.strerror}): the studio would not be there. "
                "Another program has it, perhaps another studio; --port 0 takes a free one."
            ) from error
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        for person in [] if known else dict.fromkeys([owner, *(people or [])]):
            print(f"{person}: http://{shown}:{port}/sign-in?token={gate.link(person)}")
        if known:
            print(f"http://{shown}:{port} for {', '.join(known.values())}, each with their own token")
        print(f"runs below {folder}, labels in {store}; each link works once. Ctrl-C stops.", flush=True)
        app = create_app(Studio(Runs(folder), store, gate, device=device))
        http = "auto" if host in _LOOPBACK else "h11"  # httptools is faster, and reads a request's head however long
        config = uvicorn.Config(
            app, http=http, log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        # Loaded while nobody waits for it: the first cycle that is opened would take half a second longer.
        threading.Thread(target=import_module, args=["pyarrow.parquet"], daemon=True).start()
        uvicorn.Server(config).run(sockets=[listening])


def _whoever_this_is() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "owner"


def _check_people(users: set[str] | None, owners: list[str], people: list[str]) -> None:
    """ConfigError for names that would go nowhere."""
    if users is None and owners:
        raise ConfigError(f"--owner {owners[0]} without --users: whoever starts the studio is its owner. Leave it out.")
    if users is not None and people:
        raise ConfigError(f"--person {people[0]} beside --users: nobody gets a link then. Add {people[0]} to the file.")
    unknown = [name for name in owners if name not in (users or ())]
    if unknown:
        raise ConfigError(f"--owner {unknown[0]} is not in the file of --users: nobody could be that owner. Add them.")
    for name in people:
        if name != name.strip() or not name.isprintable() or not 0 < len(name) <= 100:
            raise ConfigError(
                f"--person {name!r} is not a name: give 1 to 100 printable characters, no space around them."
            )


def read_users(file: Path) -> dict[str, str]:
    """token -> name of a users file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise ValueError('it is not {"name": "token", …}')
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--users {file} cannot be read ({error}): nobody could sign in. Write a JSON object."
        ) from error
    guessable = [f"{name}'s token has under 20 characters" for name, token in content.items() if len(token) < 20]
    if len(set(content.values())) < len(content):
        guessable.append("two people share a token")
    if guessable:
        raise ConfigError(
            f"--users {file}: {guessable[0]}, so others could come in as them. Take one for each from "
            f"{sys.executable} -c 'import secrets; print(secrets.token_urlsafe(24))'."
        )
    return {token: name for name, token in content.items()}
