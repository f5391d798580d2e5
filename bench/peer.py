"""A peer library at work in a process and an environment of its own, told line by line to run once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

SCRIPTS = Path(__file__).resolve().parent / "peers"


class Peer:
    """One of `bench/peers/*.py`, started with a job as JSON; `run` has it work once and returns what it counted.

    In between it is stopped: vLLM's engine polls for work, and would slow whoever is measured next.
    """

    def __init__(self, environment: Path, script: str, **job: Any) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [str(environment.absolute() / "bin" / "python"), str(SCRIPTS / script), json.dumps(job)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip
        self.peak_mb: int | None = None  # resident memory at its highest, where the peer tells
        self._read("ready")
        os.killpg(self._process.pid, signal.SIGSTOP)

    def run(self) -> int:
        """Once more; the number of tokens."""
        assert self._process.stdin
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        tokens, *peak = self._read("done").split()
        os.killpg(self._process.pid, signal.SIGSTOP)
        self.peak_mb = int(peak[0]) if peak else None
        return int(tokens)

    def _read(self, word: str) -> str:
        """The rest of the peer's next line that begins with `word`; what else it prints is its own chatter."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(f"@{word} "):
                return line.split(maxsplit=1)[1]
        self._log.seek(0)
        raise RuntimeError(f"the peer ended: {self._log.read()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with its children: vLLM's workers would outlive it
        self._process.wait()
        self._log.close()
