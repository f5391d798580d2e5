"""The runs below a folder, and the evaluations of `tether evaluate`.

A page names either by an id that we made; no path ever comes from a browser.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tether.config.kinds import Kind
from tether.diagnose.state import patience_s, state
from tether.errors import RunError
from tether.runs import EvaluationDir, Run
from tether.runs.tail import sample_lines

_DEEPEST = 4  # folders below the root in which runs are looked for
_OURS = {"checkpoints", "rollouts", "evaluations", "final", "best", "tensorboard", "answers"}
_MARKS = {"run": "config.yaml", "evaluation": "evaluation.json"}  # the file that makes a directory one
_LOOK_AGAIN_S = 2.0
_SPARK = 40  # points of a small curve


@dataclass(frozen=True)
class RunRow:
    """A run and what its row in the list shows."""

    id: str
    name: str  # its path below the root
    kind: str
    state: str  # running, finished, stopped, failed, or stale: it says running and has not been heard of for a while
    heartbeat: str
    cycles: int
    score: list[float | None]
    kl: list[float | None]


class Runs:
    """Every run below `root`, and every evaluation, looked up again after a while."""

    def __init__(self, root: Path) -> None:
        self.root, self.given = root.resolve(), str(root)  # as it is shown
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, Path]] = {"run": {}, "evaluation": {}}  # id -> path
        self._looked = float("-inf")

    def all(self) -> dict[str, str]:
        """The runs: id -> path below the root, by path."""
        self._look()
        return {run_id: self._name(path) for run_id, path in self._found["run"].items()}

    def evaluations(self) -> list[str]:
        """Ids of what `tether evaluate` wrote, by path."""
        self._look()
        return list(self._found["evaluation"])

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked > _LOOK_AGAIN_S:
                below = sorted(_below(self.root, _DEEPEST))
                self._found = {what: {_id(p, self.root): p for p, kind in below if kind == what} for what in _MARKS}
                self._looked = time.monotonic()

    def open(self, run_id: str) -> Run:
        """The run of an id; RunError if it is gone or never was."""
        return Run(self._path("run", run_id))

    def evaluation(self, evaluation_id: str) -> EvaluationDir:
        """The evaluation of an id; RunError if it is gone or never was."""
        return EvaluationDir(self._path("evaluation", evaluation_id))

    def _path(self, what: str, its_id: str) -> Path:
        if its_id not in self._found[what]:
            self._look()
        path = self._found[what].get(its_id)
        if path is None or not (path / _MARKS[what]).is_file():
            raise RunError(f"there is no {what} {its_id[:40]!r} below {self.given}: it was moved or deleted.")
        return path

    def name(self, run: Run | EvaluationDir) -> str:
        """A run's, or an evaluation's, path below the root."""
        return self._name(run.path)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path != self.root else path.name

    def row(self, run_id: str) -> RunRow:
        """What the list shows of a run."""
        run = self.open(run_id)
        status, kind, file = run.status, run.kind, run.path / "metrics.jsonl"
        stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else (0, 0)
        curves, patience = _curves(file, kind, stamp)
        return RunRow(
            id=run_id, name=self.name(run), kind=kind.command,
            state=state(status, datetime.now(UTC), patience_s=patience),
            heartbeat=status.get("heartbeat", ""), **curves,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _curves(file: Path, kind: Kind, stamp: tuple[int, int]) -> tuple[dict[str, Any], float]:
    """(what a row shows of metrics.jsonl, the run's patience in seconds), kept while the file is the same."""
    lines, _ = sample_lines(file, _SPARK)
    shown = {
        "cycles": int(lines[-1].get(kind.unit, 0)) if lines else 0,
        "score": [m.get(next((name for _, name, _ in kind.headline), "")) for m in lines],
        "kl": [m.get("kl/ref_mean") for m in lines],
    }
    return shown, patience_s(lines)


def _id(path: Path, root: Path) -> str:
    return hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]


def _below(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    """(a directory, what it is: run or evaluation)."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    names = {entry.name for entry in entries}
    if "evaluation.json" in names:
        yield folder, "evaluation"
    if {"config.yaml", "status.json"} <= names:
        yield folder, "run"
        return
    for entry in entries if depth else ():
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and entry.name not in _OURS:
            yield from _below(Path(entry.path), depth - 1)
