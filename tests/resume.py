"""Starting a command in a process of its own, to kill it and see what another makes of what it left."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tether import Run


def launch(command: str, config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from tether.cli import main; sys.exit(main())", command, str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has so many lines; the process must not end before."""
    file, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"never came to step {step}: {process.communicate()[1]}")


def steady(run: Run) -> list[dict[str, Any]]:
    """The metrics that must not depend on being killed: all but times and memory."""
    changing = ("time/", "tokens_per_s/", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(changing)} for line in run.metrics]
