"""Whether this process is one of several, as torchrun says in the environment. Loads no torch."""

from __future__ import annotations

import os

from tether.errors import ConfigError


def world() -> tuple[int, int]:
    """(rank, size) as torchrun, or whatever started this process, says; (0, 1) where nothing does."""
    environ = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return 0, 1
    return int(environ["RANK"]), int(environ["WORLD_SIZE"])


def refuse(what: str) -> None:
    """Raise ConfigError where this is one of several processes, and `what` is for one."""
    if world()[1] > 1:
        raise ConfigError(
            f"{what} does not run on {world()[1]} processes: each would do the whole of it, and write into the same "
            "directory. Start it without torchrun."
        )
