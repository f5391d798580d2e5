"""Answers as pages name them: of a run's cycle, or of one model that `tether evaluate` asked.

A key is RUN_ID:rollouts:CYCLE, RUN_ID:evaluations:CYCLE or EVALUATION_ID:answers:MODEL, the model's place in
evaluation.json; a key and a row's number name one answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from tether.errors import RunError
from tether.runs import EvaluationDir, short_name
from tether.studio.shared import Studio, is_count
from tether.studio.tokens import Folder, read


@dataclass(frozen=True)
class Answers:
    """Answers of one model to some prompts, one a row, each with its `number`."""

    key: str
    name: str
    rows: list[dict[str, Any]]
    source: dict[str, Any]  # where they come from, as the store of labels keeps it
    page: str | None  # address below which each has its page, token by token; None where it has none

    @classmethod
    def of(cls, studio: Studio, key: str) -> Answers:
        """The answers that a key names; RunError if it names none."""
        whose, folder, number = [*key.split(":"), "", ""][:3]
        if folder not in ("rollouts", "evaluations", "answers") or not is_count(number) or key.count(":") != 2:
            raise RunError(f"{key[:60]!r} names no answers. Use the choices and buttons of the pages.")
        index = int(number)
        if folder == "answers":
            found = studio.runs.evaluation(whose)
            models, name = found.models, studio.runs.name(found)
            if index >= len(models):
                raise RunError(f"{name} compares {len(models)} models: there is no number {index}.")
            source: dict[str, Any] = {"evaluation": name, "model": models[index]}
            file = found.file(index)
            rows = _read(str(found.path), index, file.stat().st_mtime_ns if file.exists() else 0)
            return cls(key, f"{name}: {short_name(models[index])}", rows, source, None)
        run = studio.runs.open(whose)
        rows = read(run, cast(Folder, folder), index).rows
        name = studio.runs.name(run)
        source = {"run": name, "folder": folder, "cycle": index}
        return cls(key, f"{name}, cycle {index}", rows, source, f"/runs/{whose}/{folder}/{index}")

    def by_prompt(self) -> dict[str, list[dict[str, Any]]]:
        """prompt -> its answers, in the order they were drawn."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(row["prompt"], []).append(row)
        return found


def answer(studio: Studio, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(where it comes from, the row) of KEY:NUMBER; RunError if there is no such answer."""
    key, _, number = name.rpartition(":")
    found = Answers.of(studio, key)
    if not is_count(number) or int(number) >= len(found.rows):
        raise RunError(f"{found.name} has {len(found.rows)} responses: there is no number {number[:20]}.")
    return found.source | {"row": int(number)}, found.rows[int(number)]


@lru_cache(maxsize=8)
def _read(path: str, index: int, stamp: int) -> list[dict[str, Any]]:
    return [row | {"number": i} for i, row in enumerate(EvaluationDir(path).answers(index).to_pylist())]
