"""Everybody else's side of a run directory: reading, also while the run is still going."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.config import Config
from tether.config.kinds import KINDS, Kind
from tether.config.reading import load_config
from tether.errors import ConfigError, RunError
from tether.runs.files import read_environment, read_json, read_lines, read_status, read_table

if TYPE_CHECKING:
    import pyarrow


def recorded_config(path: Path, command: str) -> Config:
    """The config that the run in `path` was made with; RunError where this version does not read it."""
    try:
        return load_config(path, command)
    except ConfigError as error:
        raise RunError(
            f"{path / 'config.yaml'} is not read by this version of tether, so the run can neither be shown nor "
            f"continued: {error} Change it in that file, or add --fresh to the command to move the run aside."
        ) from error


class Run:
    """A run, to look at: finished or not, of any command."""

    path: Path  # the directory

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in `path`; RunError if there is none."""
        run = cls(path)
        if not (run.path / "config.yaml").exists():
            raise RunError(
                f"{path} is not a run directory: it has no config.yaml, so there is nothing to read. Give the "
                "directory that `run:` names in the config of `tether ppo`, `tether sft` or `tether reward`."
            )
        return run

    @property
    def config(self) -> Config:
        """Its config, as the dataclass that it was written from."""
        return recorded_config(self.path, self.kind.command)

    @property
    def kind(self) -> Kind:
        """The row of its command; RunError where status.json names none."""
        command = self.status["kind"]
        if command not in KINDS or not KINDS[command].trains:
            raise RunError(
                f"{self.path} says that it is a run of `tether {command}`, which is none. Restore its status.json."
            )
        return KINDS[command]

    @property
    def status(self) -> dict[str, Any]:
        """schema, kind, state (running, finished, stopped, failed), pid, host, heartbeat, exit_reason, and exit_code
        (under torchrun a saved stop exits 0 all the same)."""
        return read_status(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """id, created, inputs (hashes of model and data), seed, versions, hardware, command, directory."""
        return read_environment(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per cycle (or step), ascending."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, in order: each with `time` and `event`."""
        return read_lines(self.path / "events.jsonl")

    @property
    def held_out_claim(self) -> str:
        """What is true of the prompts that a run is evaluated on, by its own count."""
        counts = [event for event in self.events if event["event"] == "prompts"]
        if not counts:
            return "prompts, the same each time"
        both = max(event["trained_on"] for event in counts)
        return "prompts that are never trained on" if not both else f"prompts, of which {both} are trained on too"

    @property
    def final(self) -> Path:
        """The Hugging Face directory of the last policy; there once the run is finished."""
        return self.path / "final"

    @property
    def best(self) -> dict[str, Any] | None:
        """cycle and score of the policy in best/, the best evaluated one; None where there is none that can be read."""
        try:
            return read_json(self.path / "best" / "best.json", cycle=int, score=float)
        except RunError:
            return None

    @property
    def rollout_cycles(self) -> list[int]:
        """Cycles whose rollouts were written, ascending."""
        return self.cycles("rollouts")

    @property
    def evaluation_cycles(self) -> list[int]:
        """Cycles that were evaluated, ascending."""
        return self.cycles("evaluations")

    def rollouts(self, cycle: int) -> pyarrow.Table:
        """A cycle's responses, one a row; `.to_pylist()` makes dicts of them, `.to_pandas()` a frame."""
        return self.table("rollouts", cycle)

    def evaluations(self, cycle: int) -> pyarrow.Table:
        """A cycle's evaluation, one response a row."""
        return self.table("evaluations", cycle)

    def cycles(self, folder: str) -> list[int]:
        """Cycles of which there is a table in rollouts or evaluations, ascending."""
        return sorted(int(file.stem.removeprefix("cycle-")) for file in (self.path / folder).glob("cycle-*.parquet"))

    def table_file(self, folder: str, cycle: int) -> Path:
        """Where a cycle's table is."""
        return self.path / folder / f"cycle-{cycle:06d}.parquet"

    def table(self, folder: str, cycle: int, columns: list[str] | None = None) -> pyarrow.Table:
        """A cycle's table; columns: only those of them that it has."""
        file = self.table_file(folder, cycle)
        if not file.exists():
            there = ", ".join(map(str, self.cycles(folder))) or "none"
            raise RunError(
                f"{file} does not exist: {folder} were written of these cycles: {there}. Ask for one of them."
            )
        return read_table(file, columns)


class EvaluationDir:
    """What `tether evaluate` wrote: several models' answers to the same prompts."""

    path: Path  # the directory

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def index_file(self) -> Path:
        """The file that names the models and holds the results."""
        return self.path / "evaluation.json"

    @property
    def models(self) -> list[str]:
        """Their directories or hub ids, the baseline first; RunError where evaluation.json is not what was written."""
        return [str(result["model"]) for result in self.results]

    @property
    def results(self) -> list[dict[str, Any]]:
        """One dict per model, the baseline first: model, score and kl (mean, low, high; kl may be null), and more."""
        try:
            found = json.loads(self.index_file.read_text(encoding="utf-8"))["results"]
            return [
                result | {"model": result["model"], "score": result["score"], "kl": result["kl"]} for result in found
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.index_file} cannot be read ({type(error).__name__}): it is unclear which models these are. Run "
                "tether evaluate again."
            ) from error

    @property
    def best_of(self) -> list[dict[str, Any]]:
        """Choosing the best of n of the baseline's answers: n, score and kl (mean, low, high), n ascending."""
        try:
            return list(json.loads(self.index_file.read_text(encoding="utf-8")).get("best_of", []))
        except (OSError, ValueError, AttributeError, TypeError):
            return []  # what is wrong with the file is said where its models are read

    def file(self, index: int) -> Path:
        """Where the answers of `models[index]` are."""
        return self.path / "answers" / f"model-{index:02d}.parquet"

    def answers(self, index: int) -> pyarrow.Table:
        """One response a row: prompt, completion, score, kl and more; kl is null where vocabularies differ."""
        if not self.file(index).exists():
            raise RunError(
                f"{self.file(index)} does not exist: its answers cannot be shown. Run tether evaluate again."
            )
        return read_table(self.file(index))


def short_name(model: str) -> str:
    """The last two parts of a model's path: runs/a/final and runs/b/final differ in the first of them."""
    return "/".join(Path(model).parts[-2:])
