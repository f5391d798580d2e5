"""The trainer's side of a run directory: open it or continue it, then write."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from tether.config import Config
from tether.config.kinds import KINDS
from tether.config.reading import to_yaml
from tether.errors import Interrupted, RunError, TetherError
from tether.runs import answers
from tether.runs.environment import describe_environment, environment_changes
from tether.runs.files import (
    SCHEMA,
    append_line,
    drop_half_line,
    json_line,
    now,
    read_environment,
    read_lines,
    to_plain,
    wrap_os_errors,
    write_atomically,
    write_table,
)
from tether.runs.lock import Lock
from tether.runs.resume import (
    Continuation,
    check_place,
    continuation,
    has_something_to_continue,
    keeps_bits,
    reward_changes,
)


class RunDirectory:
    """A run directory open for writing, by one process at a time.

        with RunDirectory.open(config, command="ppo", inputs={"prompts.path": hash_files(path)}) as run:
            if run.finished:
                …
            if run.resumed:
                run.truncate_after(step)

    Leaving the block sets the status: finished; stopped for `Interrupted` and Ctrl-C; failed for any other exception.

    path      the directory.
    config    the resolved config, as given.
    command   that of its row in tether.config.kinds: ppo, sft, …
    unit      what a step is called: cycle or step.
    resumed   the directory held this run already.
    phase     what the run is doing now, in words.
    notes     what the person should hear about how the run goes on.
    finished  the run had ended before, its final model is there, and there is nothing more to do.
    follows   another process of the run writes: here every write does nothing. So is what a copy sent to it becomes.
    """

    def __init__(self, config: Config, command: str, lock: Lock | None, *, resumed: bool, finished: bool):
        self.path, self.config, self.command = _path(config), config, command
        self.unit = KINDS[command].unit
        self.resumed, self.finished = resumed, finished
        self.notes: list[str] = []
        self._lock, self.follows = lock, lock is None
        self.phase = "loading the models"
        self._last_heartbeat = 0.0
        self._writing_status = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _follow, (self.config, self.command, self.resumed, self.finished)

    @classmethod
    def open(
        cls, config: Config, *, command: str, fresh: bool = False, inputs: dict[str, str] | None = None
    ) -> RunDirectory:
        """Create the directory `config.run`, or continue the run in it.

        A run that failed before its first cycle was done has nothing to continue: it is started over in place, with any
        config, so that a mistake in the first config can simply be fixed.

        inputs: hashes of model and data by config key, {"model.policy": hash_files(…), …}: a run continues only on what
            it began with.
        fresh: move a run that is there to RUN.old-N first, and start over.

        Raises RunError when the directory is in use, is not a run, or holds a run that this config does not continue.
        """
        path = _path(config)
        lock = _make_and_lock(path)
        try:
            if fresh and any(file.name != "lock" for file in path.iterdir()):
                path.rename(aside(path.absolute()))  # the lock moves along, still held
                lock.release()
                lock = _make_and_lock(path)
            if there := continuation(path, command, config, inputs or {}):
                return cls._continue(config, command, lock, inputs or {}, there)
            return cls._create(config, command, lock, inputs or {})
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _create(cls, config: Config, command: str, lock: Lock, inputs: dict[str, str]) -> RunDirectory:
        run = cls(config, command, lock, resumed=False, finished=False)
        _remove_what_came_to_nothing(run.path, config)
        environment = {"id": uuid4().hex, "created": now(), "inputs": inputs, "seed": config.seed}
        environment |= describe_environment()
        write_atomically(run.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        run._set_status("running")
        run.event("created")
        write_atomically(run.path / "config.yaml", to_yaml(config))  # last: where it stands, the rest does
        return run

    @classmethod
    def _continue(
        cls, config: Config, command: str, lock: Lock, inputs: dict[str, str], there: Continuation
    ) -> RunDirectory:
        run = cls(config, command, lock, resumed=True, finished=there.finished)
        if run.finished:
            return run
        path, environment, final = run.path, read_environment(run.path), run.path / "final"
        for name in ("events.jsonl", "metrics.jsonl"):
            drop_half_line(path / name)
        for key, old, new in there.changed:
            run.event("config_changed", key=key, old=old, new=new, bit_equal=keeps_bits((key, old, new)))
        for key, old, new in reward_changes(environment["inputs"], inputs, read_lines(path / "events.jsonl")):
            spec = _function(config, key)
            run.event("reward_changed", key=key, function=spec, old=old, new=new, bit_equal=False)
            run.notes.append(f"reward function {spec} has other code than before: scores may not be comparable")
        for key, old, new in environment_changes(environment):
            run.event("environment_changed", key=key, old=old, new=new, bit_equal=False)
        if there.damaged:
            run.event("final_damaged", what=there.damaged)
            run.notes.append(f"{final} is damaged ({there.damaged}): it is written again from the last checkpoint")
        run._set_status("running")
        if there.grew and final.exists():  # it would pass for the model of the longer run
            old = aside(final)
            with wrap_os_errors(final):
                final.rename(old)
            run.event("final_moved", to=old.name)
        write_atomically(path / "config.yaml", to_yaml(config))  # last: what is said above is said until it is done
        return run

    def check_visible(self) -> None:
        """Raise RunError where this process, which follows, does not see the directory that the other writes."""
        if self.follows and not (self.path / "config.yaml").exists():
            raise RunError(
                f"{socket.gethostname()} does not see {self.path.absolute()}, which rank 0 writes: it could not read a "
                "checkpoint back. Set run to a directory on a file system that all hosts share."
            )

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.finished:
                return
            if error is None:
                self._set_status("finished", "done", 0)
                return
            self.fail(error)
        finally:
            if self._lock is not None:
                self._lock.release()

    def fail(self, error: BaseException) -> None:
        """Write down what ends the run."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        with contextlib.suppress(RunError):  # a full disk must not hide the error that we are reporting
            self._set_status("stopped" if stopped else "failed", _reason(error), getattr(error, "exit_code", 1))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl. `metrics` holds `cycle` (or `step`); numbers that are not finite become null."""
        if self.follows:
            return
        append_line(self.path / "metrics.jsonl", to_plain(metrics))
        self.heartbeat()

    def replace_last_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the last line of metrics.jsonl again."""
        if self.follows:
            return
        lines = [*self.metrics()[:-1], to_plain(metrics)]
        write_atomically(self.path / "metrics.jsonl", "".join(json_line(line) for line in lines))

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl so far."""
        return read_lines(self.path / "metrics.jsonl")

    def event(self, name: str, **fields: Any) -> None:
        """One line of events.jsonl: something that happened once, and when."""
        if not self.follows:
            append_line(self.path / "events.jsonl", {"time": now(), "event": name, **to_plain(fields)})

    def write_rollouts(self, cycle: int, columns: dict[str, list[Any]]) -> None:
        """rollouts/cycle-NNNNNN.parquet: one row a response; per-token columns are lists of lists."""
        self._write_table("rollouts", cycle, columns)

    def write_evaluation(self, cycle: int, columns: dict[str, list[Any]]) -> None:
        """evaluations/cycle-NNNNNN.parquet: the same columns, on the fixed prompts."""
        self._write_table("evaluations", cycle, columns)

    def truncate_after(self, step: int) -> None:
        """Forget what came after `step`, the checkpoint that the run continues from: each step appears once."""
        if self.follows:
            return
        kept = [line for line in self.metrics() if line[self.unit] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json_line(line) for line in kept))
        for folder in ("rollouts", "evaluations"):
            for file in (self.path / folder).glob("*"):
                cycle = re.fullmatch(r"cycle-(\d+)\.parquet", file.name)
                if file.name.endswith(".partial") or (cycle and int(cycle[1]) > step):
                    file.unlink()
        if self.resumed:
            self.event("resumed", **{self.unit: step})

    def heartbeat(self) -> None:
        """Tell readers that we are alive: refreshes status.json, at most once a second."""
        if time.monotonic() - self._last_heartbeat >= 1.0:
            self._set_status("running")

    def _set_status(self, state: str, exit_reason: str | None = None, exit_code: int | None = None) -> None:
        if self.follows:
            return
        status = {
            "schema": SCHEMA,
            "kind": self.command,
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "heartbeat": now(),
            "exit_reason": exit_reason,
            "exit_code": exit_code,
        }
        with self._writing_status:
            write_atomically(self.path / "status.json", json.dumps(status, indent=2) + "\n")
        self._last_heartbeat = time.monotonic()

    def _write_table(self, folder: str, cycle: int, columns: dict[str, list[Any]]) -> None:
        if self.follows:
            return
        with wrap_os_errors(self.path / folder):
            (self.path / folder).mkdir(exist_ok=True)
        write_table(self.path / folder / f"cycle-{cycle:06d}.parquet", columns)


def _follow(config: Config, command: str, resumed: bool, finished: bool) -> RunDirectory:
    return RunDirectory(config, command, None, resumed=resumed, finished=finished)


def _path(config: Config) -> Path:
    return Path(str(vars(config)["run"]))


def _function(config: Config, key: str) -> str:
    """FILE.py:NAME of the source that `key`, reward[0].function, stands for."""
    return str(asdict(config)["reward"][int(key[len("reward[") : key.index("]")])]["function"])


def _make_and_lock(path: Path) -> Lock:
    check_place(path)
    with wrap_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        return Lock(path)


def recorded_inputs(path: str | Path) -> dict[str, str]:
    """The inputs of the run in `path`, where the same command would continue it; else {}."""
    path = Path(path)
    return dict(read_environment(path)["inputs"]) if has_something_to_continue(path) else {}


def _remove_what_came_to_nothing(path: Path, config: Config) -> None:
    """Files of a process that ended before its first cycle did; what stays is overwritten. What other machines answered
    is kept for the same config: it will ask the same."""
    before = path / "config.yaml"
    if not before.exists() or before.read_text(encoding="utf-8") != to_yaml(config):
        for name in (answers.NAME, f"{answers.NAME}-journal"):
            (path / name).unlink(missing_ok=True)
    for name in ("events.jsonl", "metrics.jsonl"):
        (path / name).unlink(missing_ok=True)
    for name in ("rollouts", "evaluations", "checkpoints", "best", "members"):
        shutil.rmtree(path / name, ignore_errors=True)


def aside(path: Path) -> Path:
    """Where --fresh moves what stands at `path`: PATH.old-N."""
    n = 1
    while (old := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    return old


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {error}".removesuffix(": ")
