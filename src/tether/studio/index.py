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
from pathlib import Path
from typing import Any

from tether.diagnose.state import patience_s, state
from tether.errors import RunError
from tether.runs import EvaluationDir, Run
from tether.runs.tail import sample_lines

_DEEPEST = 4  # folders below the root in which runs are looked for
_OURS = {"checkpoints", "rollouts", "evaluations", "final", "best", "tensorboard", "answers"}
_LOOK_AGAIN_S = 2.0
_SPARK = 40  # points of a small curve


@dataclass(frozen=True)
class RunRow:
    """A run and what its row in the list shows."""

    id: str
    name: str
    """Its path below the root."""
    kind: str
    state: str
    """running, finished, stopped, failed, or stale: it says running and has not been heard of for a while."""
    heartbeat: str
    cycles: int
    score: list[float | None]
    kl: list[float | None]


class Runs:
    """Every run below `root`, and every evaluation, looked up again after a while.

    Reading a run's row costs a few small reads; it is kept until the run's files change.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.given = root.resolve(), str(root)  # as it is shown
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._evaluations: dict[str, Path] = {}
        self._looked = float("-inf")
        self._rows: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def all(self) -> list[str]:
        """Ids of the runs, by path."""
        self._look()
        return list(self._paths)

    def evaluations(self) -> list[str]:
        """Ids of what `tether evaluate` wrote, by path."""
        self._look()
        return list(self._evaluations)

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked > _LOOK_AGAIN_S:
                below = sorted(_below(self.root, _DEEPEST))
                self._paths = {_id(p, self.root): p for p, is_run in below if is_run}
                self._evaluations = {_id(p, self.root): p for p, is_run in below if not is_run}
                self._looked = time.monotonic()

    def open(self, run_id: str) -> Run:
        """The run of an id; RunError if it is gone or never was."""
        if run_id not in self._paths:
            self._look()
        path = self._paths.get(run_id)
        if path is None or not (path / "config.yaml").is_file():
            raise RunError(f"there is no run {run_id[:40]!r} below {self.given}: it was moved or deleted.")
        return Run.open(path)

    def evaluation(self, evaluation_id: str) -> EvaluationDir:
        """The evaluation of an id; RunError if it is gone or never was."""
        if evaluation_id not in self._evaluations:
            self._look()
        path = self._evaluations.get(evaluation_id)
        if path is None or not EvaluationDir(path).index_file.is_file():
            raise RunError(
                f"there is no evaluation {evaluation_id[:40]!r} below {self.given}: it was moved or deleted."
            )
        return EvaluationDir(path)

    def checked(self, run_id: str) -> str:
        """The id, if it is one of ours; RunError if not."""
        self.open(run_id)
        return run_id

    def shown(self, run_id: str) -> str:
        """An id's path below the root."""
        path = self._paths.get(run_id, self.root)
        return str(path.relative_to(self.root)) if path != self.root else path.name

    def name(self, run: Run | EvaluationDir) -> str:
        """A run's, or an evaluation's, path below the root."""
        return str(run.path.relative_to(self.root)) if run.path != self.root else run.path.name

    def row(self, run_id: str) -> RunRow:
        """What the list shows of a run."""
        run = self.open(run_id)
        status = run.status
        kept = self._curves(run_id, run)
        patience = kept.pop("patience")
        return RunRow(
            id=run_id, name=self.name(run), kind=run.kind.command,
            state=state(status, datetime.now(UTC), patience_s=patience),
            heartbeat=status.get("heartbeat", ""), **kept,
        )  # fmt: skip

    def _curves(self, run_id: str, run: Run) -> dict[str, Any]:
        file = run.path / "metrics.jsonl"
        stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else (0, 0)
        before = self._rows.get(run_id)
        if before and before[0] == stamp:
            return dict(before[1])
        lines, _ = sample_lines(file, _SPARK)
        kind = run.kind
        found = {
            "cycles": int(lines[-1].get(kind.unit, 0)) if lines else 0,
            "score": [m.get(next((name for _, name, _ in kind.headline), "")) for m in lines],
            "kl": [m.get("kl/ref_mean") for m in lines],
            "patience": patience_s(lines),
        }
        self._rows[run_id] = stamp, found
        return dict(found)


def _id(path: Path, root: Path) -> str:
    return hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]


def _below(folder: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """(a directory, whether it is a run): else it is an evaluation."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    names = {entry.name for entry in entries}
    if "evaluation.json" in names:
        yield folder, False
    if {"config.yaml", "status.json"} <= names:
        yield folder, True
        return
    for entry in entries if depth else ():
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and entry.name not in _OURS:
            yield from _below(Path(entry.path), depth - 1)
