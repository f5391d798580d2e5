"""`tether serve`: load a reward model, print address and token, answer until interrupted."""

from __future__ import annotations

import os
import secrets
import socket
import sys

from tether.errors import ConfigError

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_SHORTEST_TOKEN = 20  # characters


def serve(
    path: str, *, host: str = "127.0.0.1", port: int = 8766, token_env: str | None = None, device: str = "auto",
    dtype: str = "auto", most_rows: int, most_megabytes: int, most_waiting: int,
) -> None:  # fmt: skip
    """Score what is asked until interrupted.

    path: directory or hub id of a reward model. port: 0 takes a free one.
    token_env: the environment variable that holds the token; None: one is made and printed.
    most_rows, most_megabytes: of one request. most_waiting: requests that are scored or wait for it.
    """
    try:
        import uvicorn

        from tether.serving.app import Limits, create_app
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, so there is no server: pip install 'tether[studio]'."
        ) from error
    if not 0 <= port < 2**16:
        raise ConfigError(
            f"--port {port} is not a port: nothing could listen there. Give 1 to 65535, or 0 for a free one."
        )
    for flag, value in (("--rows", most_rows), ("--megabytes", most_megabytes), ("--waiting", most_waiting)):
        if value < 1:
            raise ConfigError(f"{flag} {value} is below 1: nothing would be answered. Give 1 or more.")
    token = _token(token_env)
    limits = Limits(most_rows, most_megabytes * 1_000_000, most_waiting)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))  # before the model is loaded: that may take minutes
        except OSError as error:
            raise ConfigError(
                f"--port {port} on {host} cannot be listened on ({error.strerror}): nobody could ask for scores. "
                "Another program has it, perhaps another tether serve; --port 0 takes a free one."
            ) from error
        from tether.serving.scoring import ServedModel

        model = ServedModel(path, dtype=dtype, device=device)
        port = listening.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/score"
        if host not in _LOOPBACK:
            print(
                f"warning: {host} can be reached from other machines, and this is plain HTTP: what is asked, and the "
                "token, can be read on the way. Better a tunnel (ssh -L) or a proxy with TLS.",
                file=sys.stderr,
            )
        print(f"{model.name} at {url}")
        print(f"token: the value of {token_env}" if token_env else f"token: {token}")
        print(f'reward: [{{url: "{url}", key_env: {token_env or "TETHER_KEY"}}}] in a config, with the token in that '
              "environment variable. Ctrl-C stops.", flush=True)  # fmt: skip
        config = uvicorn.Config(
            create_app(model, token=token, limits=limits), http="auto" if host in _LOOPBACK else "h11",
            log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=60,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # raised again by uvicorn, when all that was asked is answered
            print("stopped", file=sys.stderr)


def _token(variable: str | None) -> str:
    """What clients must show."""
    if variable is None:
        return secrets.token_urlsafe(24)
    token = os.environ.get(variable, "")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        what = "is not set" if not token else f"is not {_SHORTEST_TOKEN} or more plain characters"
        raise ConfigError(
            f"--token-env {variable}: the environment variable {what}, so others could guess the token. Take one from "
            f"{sys.executable} -c 'import secrets; print(secrets.token_urlsafe(24))'."
        )
    return token
