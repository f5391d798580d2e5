"""One writer a run directory: flock, which the kernel lets go when the process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from tether.errors import RunError

_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker inherits the open file, and the lock with it: should it outlive us, nobody could continue the run.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """The lock of an existing directory, taken at once or not at all; RunError names the process that has it."""

    def __init__(self, folder: Path):
        file = folder / "lock"
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or os.fstat(self._descriptor).st_ino != file.stat().st_ino:
                raise BlockingIOError  # another process moved the directory aside while we were opening it
        except BlockingIOError:
            holder = os.read(self._descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise RunError(
                f"{folder} is in use by {holder}: two writers would mix their cycles. Wait for it, stop it, or set run "
                "to another directory."
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(self._descriptor)

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            # Unlocked by name: closing alone would leave it to a worker forked a moment ago, until it closes its copy.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
