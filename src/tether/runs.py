"""The run directory, schema 1: the one thing that trainers, studio, report and doctor share.

`RunDirectory` is the trainer's side: it locks the directory, decides whether this command may continue what is there,
and writes. `Run` is everybody else's: it only reads, also while the run is still going.

    config.yaml     the resolved config                     metrics.jsonl   one object a cycle (sft, reward: a step)
    environment.json  versions, hardware, hashes            rollouts/       cycle-000012.parquet, a row a response
    status.json     running, finished, stopped, failed      evaluations/    likewise, on the fixed prompts
    events.jsonl    resumes, changes, alarms                checkpoints/    see tether.train.checkpoint
    lock            flock: one writer at a time             final/          the last policy, a Hugging Face directory

A process may be killed at any instruction. Whole files are therefore written beside and renamed; lines are appended,
and half a line at the end of a file is what a killed process leaves, dropped by every reader.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from tether.config import Config
from tether.errors import Interrupted, RunError, TetherError
from tether.parse import load_config, to_yaml

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
Command = Literal["ppo", "sft", "reward"]

# Keys that a resumed run may change. `run` is where the directory is now: it may have been moved.
_MAY_CHANGE = re.compile(
    r"run$|(log|checkpoint|evaluate)(\.|$)|reward\[\d+\]\.timeout_s$"
    r"|(ppo|sft|reward_model)\.microbatch_tokens$|model\.gradient_checkpointing$"
)
# These change the order of floating-point sums, so the rest of the run is equal only up to rounding.
_ROUNDING = re.compile(r".*\.(microbatch_tokens|gradient_checkpointing)$")

_OWN_FILES = {"lock", "config.yaml", "environment.json", "status.json", "events.jsonl", "metrics.jsonl"}


class RunDirectory:
    """A run directory open for writing, by one process at a time.

        with RunDirectory.open(config, command="ppo", inputs={"prompts.path": hash_files(path)}) as run:
            if run.finished:
                ...
            if run.resumed:
                run.cut_back(step)

    Leaving the block sets the status: finished; stopped for `Interrupted` and Ctrl-C; failed for any other exception.

    path      the directory.
    config    the resolved config, as given.
    command   ppo, sft or reward.
    unit      what `step` counts: "cycle" for ppo, "step" for sft and reward.
    resumed   the directory held this run already.
    finished  the run had ended before, and there is nothing more to do.
    """

    def __init__(self, path: Path, config: Config, command: Command, lock: int, *, resumed: bool, finished: bool):
        self.path, self.config, self.command = path, config, command
        self.unit = "cycle" if command == "ppo" else "step"
        self.resumed, self.finished = resumed, finished
        self._lock = lock
        self._last_heartbeat = 0.0

    @classmethod
    def open(
        cls, config: Config, *, command: Command, fresh: bool = False, inputs: dict[str, str] | None = None
    ) -> RunDirectory:
        """Create the directory `config.run`, or continue the run in it.

        inputs: hashes of model and data by config key, {"model.policy": hash_files(…), …}: a run continues only on what
            it began with.
        fresh: move a run that is there to RUN.old-N first, and begin anew.

        Raises RunError when the directory is in use, is not a run, or holds a run that this config does not continue.
        """
        path, inputs = Path(str(config.run)), inputs or {}
        lock = _make_and_lock(path)
        try:
            if fresh and any(file.name != "lock" for file in path.iterdir()):
                _refuse_what_is_not_a_run(path)
                path.rename(_aside(path.absolute()))  # the lock moves along, still held
                os.close(lock)
                lock = _make_and_lock(path)
            _refuse_what_is_not_a_run(path)
            if (path / "config.yaml").exists():
                run = cls._resume(path, config, command, lock, inputs)
            else:
                run = cls._create(path, config, command, lock, inputs)
        except BaseException:
            _unlock(lock)
            raise
        return run

    @classmethod
    def _create(cls, path: Path, config: Config, command: Command, lock: int, inputs: dict[str, str]) -> RunDirectory:
        run = cls(path, config, command, lock, resumed=False, finished=False)
        for name in ("events.jsonl", "metrics.jsonl"):
            (path / name).unlink(missing_ok=True)
        environment = {
            "id": uuid4().hex,
            "created": _now(),
            "inputs": inputs,
            "seed": config.seed,
            **describe_environment(),
        }
        write_atomically(path / "environment.json", json.dumps(environment, indent=2) + "\n")
        (path / "metrics.jsonl").touch()
        run._set_status("running")
        run.event("created")
        write_atomically(path / "config.yaml", to_yaml(config))  # last: where it stands, the rest does
        return run

    @classmethod
    def _resume(cls, path: Path, config: Config, command: Command, lock: int, inputs: dict[str, str]) -> RunDirectory:
        status = _read_json(path / "status.json")
        if status.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has run-directory schema {status.get('schema')}, this version of tether writes {SCHEMA}: "
                f"continuing would mix the two. Set run to another directory, or add --fresh to move this one aside."
            )
        if status["kind"] != command:
            raise RunError(
                f"{path} holds a run of `tether {status['kind']}`, but this is `tether {command}`: their files would "
                "mix. Set run to another directory, or add --fresh to move the old run aside."
            )
        new = _flat(asdict(config))
        changes = _changes(_flat(asdict(load_config(path, command))), new)
        cycles_grew = any(key == "ppo.cycles" for key, _, _ in changes)
        for key, before, now in changes:
            _refuse_change(path, key, before, now, constant=new.get("optim.schedule") == "constant")
        environment = _read_json(path / "environment.json")
        for key, before, now in _changes(environment["inputs"], inputs):
            if not _MAY_CHANGE.match(key):
                raise RunError(
                    f"{key} has other content than when the run in {path} began (was {before}, is {now}): its curves "
                    "would mix two experiments. Restore it, or add --fresh to move the old run aside and begin anew."
                )

        finished = status["state"] == "finished" and not cycles_grew
        run = cls(path, config, command, lock, resumed=True, finished=finished)
        if not finished:
            _drop_half_line(path / "events.jsonl")
            for key, before, now in changes:
                run.event("config_changed", key=key, old=before, new=now, bit_equal=not _ROUNDING.match(key))
            for key, before, now in _environment_changes(environment):
                run.event("environment_changed", key=key, old=before, new=now, bit_equal=False)
            if changes:
                write_atomically(path / "config.yaml", to_yaml(config))
            run._set_status("running")
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.finished:
                return
            if error is None:
                self._set_status("finished", "done")
            else:
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                with contextlib.suppress(RunError):  # a full disk must not hide the error that we are reporting
                    self._set_status("stopped" if stopped else "failed", _reason(error))
        finally:
            _unlock(self._lock)

    # ------------------------------------------------------------ what the trainer writes

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl. `metrics` holds `cycle` (or `step`); not-finite numbers become null."""
        _append_line(self.path / "metrics.jsonl", to_plain(metrics))
        self.heartbeat()

    def event(self, name: str, **fields: Any) -> None:
        """One line of events.jsonl: something that happened once, and when."""
        _append_line(self.path / "events.jsonl", {"time": _now(), "event": name, **to_plain(fields)})

    def write_rollouts(self, cycle: int, columns: dict[str, list[Any]]) -> None:
        """rollouts/cycle-NNNNNN.parquet: one row a response. Per-token columns are lists of lists."""
        self._write_table("rollouts", cycle, columns)

    def write_evaluation(self, cycle: int, columns: dict[str, list[Any]]) -> None:
        """evaluations/cycle-NNNNNN.parquet: the same columns, on the fixed prompts."""
        self._write_table("evaluations", cycle, columns)

    def heartbeat(self) -> None:
        """Tell readers that we are alive: rewrites status.json, at most once a second."""
        if time.monotonic() - self._last_heartbeat >= 1.0:
            self._set_status("running")

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl so far."""
        return read_lines(self.path / "metrics.jsonl")

    def cut_back(self, step: int) -> None:
        """Forget what came after `step`, the checkpoint that the run continues from: each step appears once."""
        kept = [line for line in self.metrics() if line[self.unit] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(_line(line) for line in kept))
        for folder in ("rollouts", "evaluations"):
            for file in (self.path / folder).glob("*"):
                cycle = re.fullmatch(r"cycle-(\d+)\.parquet", file.name)
                if file.name.endswith(".partial") or (cycle and int(cycle[1]) > step):
                    file.unlink()
        if self.resumed:
            self.event("resumed", **{self.unit: step})

    # ------------------------------------------------------------ inside

    def _set_status(self, state: str, exit_reason: str | None = None) -> None:
        status = {
            "schema": SCHEMA,
            "kind": self.command,
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "heartbeat": _now(),
            "exit_reason": exit_reason,
        }
        write_atomically(self.path / "status.json", json.dumps(status, indent=2) + "\n")
        self._last_heartbeat = time.monotonic()

    def _write_table(self, folder: str, cycle: int, columns: dict[str, list[Any]]) -> None:
        import pyarrow.parquet

        target = self.path / folder / f"cycle-{cycle:06d}.parquet"
        partial = _partial(target)
        with saying_what_failed(target):
            target.parent.mkdir(exist_ok=True)
            try:
                pyarrow.parquet.write_table(_table(columns), partial)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)


class Run:
    """A run directory, to look at: finished or not, of any command.

    path     the directory.
    config   its config, as the dataclass it was written from.
    metrics  metrics.jsonl, a dict a line.
    final    the Hugging Face directory of the last policy; exists once the run is finished.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in `path`; RunError if there is none."""
        if not (Path(path) / "config.yaml").exists():
            raise RunError(
                f"{path} is not a run directory: it has no config.yaml, so there is nothing to read. Give the "
                "directory that `run:` names in the config of `tether ppo`, `tether sft` or `tether reward`."
            )
        return cls(Path(path))

    @property
    def config(self) -> Config:
        return load_config(self.path, self.status["kind"])

    @property
    def status(self) -> dict[str, Any]:
        return _read_json(self.path / "status.json")

    @property
    def environment(self) -> dict[str, Any]:
        return _read_json(self.path / "environment.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "events.jsonl")

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def rollout_cycles(self) -> list[int]:
        """Cycles whose rollouts were written, ascending."""
        return self._cycles("rollouts")

    @property
    def evaluation_cycles(self) -> list[int]:
        """Cycles that were evaluated, ascending."""
        return self._cycles("evaluations")

    def rollouts(self, cycle: int) -> pyarrow.Table:
        """A cycle's responses, one a row; `.to_pylist()` makes dicts of them, `.to_pandas()` a frame."""
        return self._table("rollouts", cycle)

    def evaluations(self, cycle: int) -> pyarrow.Table:
        """A cycle's evaluation, one response a row."""
        return self._table("evaluations", cycle)

    def _cycles(self, folder: str) -> list[int]:
        return sorted(int(file.stem.removeprefix("cycle-")) for file in (self.path / folder).glob("cycle-*.parquet"))

    def _table(self, folder: str, cycle: int) -> pyarrow.Table:
        import pyarrow.parquet

        file = self.path / folder / f"cycle-{cycle:06d}.parquet"
        if not file.exists():
            there = ", ".join(map(str, self._cycles(folder))) or "none"
            raise RunError(
                f"{file} does not exist: {folder} were written of these cycles: {there}. Ask for one of them."
            )
        return pyarrow.parquet.read_table(file)


def hash_files(path: str, revision: str | None = None) -> str:
    """What a model or a data file is, in a few characters: equal exactly if the content is.

    A file: its sha256. A directory: the sha256 of the names and contents of the files a model is made of (weights,
    configs, tokenizer). Anything else is a hub id, and stands for itself with its revision.
    """
    place = Path(path)
    if place.is_dir():
        parts = sorted(f for f in place.iterdir() if f.suffix in {".json", ".safetensors", ".model", ".txt", ".jinja"})
        digest = hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in parts).encode()).hexdigest()
    elif place.is_file():
        digest = sha256(place)
    else:
        return f"{path}@{revision or 'main'}"
    return f"sha256:{digest[:16]}"


def sha256(path: Path) -> str:
    """The file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the lock

_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker inherits the lock; should it outlive us, the run could not be continued.
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _make_and_lock(path: Path) -> int:
    if path.exists() and not path.is_dir():
        raise RunError(f"run={path} is a file: a run needs a directory. Set run to another name.")
    with saying_what_failed(path):
        path.mkdir(parents=True, exist_ok=True)
    file = path / "lock"
    if not file.exists():
        _refuse_what_is_not_a_run(path)
    with saying_what_failed(file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not file.exists() or os.fstat(lock).st_ino != file.stat().st_ino:
            raise BlockingIOError  # another process moved the directory aside while we were opening it
    except BlockingIOError:
        holder = os.read(lock, 1000).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise RunError(
            f"{path} is in use by {holder}: two writers would mix their cycles. Wait for it, stop it, or set run to "
            "another directory."
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(lock)
    return lock


def _unlock(lock: int) -> None:
    if lock in _held:
        _held.remove(lock)
        os.close(lock)


def _refuse_what_is_not_a_run(path: Path) -> None:
    if (path / "config.yaml").exists():
        return
    names = sorted(file.name for file in path.iterdir())
    strange = [name for name in names if name not in _OWN_FILES and not name.endswith(".partial")]
    if strange:
        raise RunError(
            f"{path} is not empty and not a run directory (it holds {strange[0]} and no config.yaml): its files would "
            "mix with the run's. Set run to a directory that does not exist yet."
        )


def _aside(path: Path) -> Path:
    n = 1
    while (old := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    return old


# ---------------------------------------------------------------- comparing configs


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """{"reward[0].weight": 1.0, …}; an empty dict or list is a value like any other."""
    if isinstance(node, dict) and node:
        pairs = [(f"{path}.{key}" if path else str(key), value) for key, value in node.items()]
    elif isinstance(node, list | tuple) and node:
        pairs = [(f"{path}[{i}]", value) for i, value in enumerate(node)]
    else:
        return {path: node}
    return {key: value for name, child in pairs for key, value in _flat(child, name).items()}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    absent = "(absent)"
    keys = list(dict.fromkeys([*old, *new]))
    return [(k, old.get(k, absent), new.get(k, absent)) for k in keys if old.get(k, absent) != new.get(k, absent)]


def _refuse_change(path: Path, key: str, before: Any, now: Any, *, constant: bool) -> None:
    if _MAY_CHANGE.match(key):
        return
    if key == "ppo.cycles" and now > before:
        if constant:
            return
        why = "the learning rate already falls towards the old end, and may grow only under optim.schedule: constant"
    else:
        why = "its curves would mix two experiments"
    raise RunError(
        f"{key} was {_shown(before)} when the run in {path} began and is {_shown(now)} now: {why}. Set it back to "
        "continue, or add --fresh to move the old run aside and begin anew."
    )


def _shown(value: Any) -> str:
    return value if value == "(absent)" else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def saying_what_failed(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a RunError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space" if full else "Make it writable"
        failure = RunError(
            f"{path} cannot be written ({error.strerror or error}): the run would lose what it does. {remedy} and run "
            "the same command again: it continues from the last checkpoint."
        )
        if full:
            failure.exit_code = 1  # the machine's state, not a mistake in what the user typed
        raise failure from error


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a killed process, sees the old file or the new one, never half."""
    partial = _partial(path)
    with saying_what_failed(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that we wrote ourselves; half a line at its end is not one yet."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            raise RunError(
                f"{path}:{number} is not JSON ({error}): the file was damaged after it was written, and its curves "
                "would have a hole. Delete that line to go on without it."
            ) from error
    return read


def _drop_half_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def _append_line(path: Path, value: dict[str, Any]) -> None:
    line = _line(value).encode()
    with saying_what_failed(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(end)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def to_plain(value: Any) -> Any:
    """What JSON can hold: tensors and numpy scalars become numbers, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}): it is unclear what this run is. Restore the file, or add --fresh to move "
            "the run aside and begin anew."
        ) from error


def _table(columns: dict[str, list[Any]]) -> pyarrow.Table:
    """Types from the values, per-token numbers in 32 bits; a column of nothing but None is a float that is missing."""
    import pyarrow as pa

    narrow = {pa.float64(): pa.float32(), pa.int64(): pa.int32(), pa.null(): pa.float32()}
    arrays = {}
    for name, values in columns.items():
        array = pa.array(values)
        if pa.types.is_null(array.type):
            array = array.cast(pa.float64())
        elif pa.types.is_list(array.type) and array.type.value_type in narrow:
            array = array.cast(pa.list_(narrow[array.type.value_type]))
        arrays[name] = array
    return pa.table(arrays)


# ---------------------------------------------------------------- the world around


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and command line: what a run's numbers depend on beside its config."""
    import psutil
    import torch

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": _versions(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in cuda],
        },
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("tether", "torch", "transformers", "peft", "safetensors", "numpy", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
            versions[package] = importlib.metadata.version(package)
    return versions


def _environment_changes(then: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What may change a floating-point result though the config is the same."""
    now = describe_environment()
    return [c for part in ("versions", "hardware") for c in _changes(_flat(then[part], part), _flat(now[part], part))]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {error}"
