"""Whether a command continues the run that is there: same config, same inputs, but for what cannot spoil the curves.

`RunDirectory` goes by these rules, and so does a dry run: nothing here writes or locks.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tether.config import Config
from tether.config.kinds import KINDS, kind_of
from tether.errors import RunError
from tether.runs.files import SCHEMA, damage, read_environment, read_lines, read_status
from tether.runs.reader import recorded_config

Change = tuple[str, Any, Any]  # dotted key, value when the run began, value now

# `run` is where the directory is now: it may have been moved. What a revision stands for is among the inputs.
_MAY_CHANGE = re.compile(
    r"run$|model\.revision$|(log|checkpoint|distributed)(\.|$)|evaluate\.(every|samples|stop_when_gold_falls)$"
    r"|(reward|evaluate\.gold)\[\d+\]\.(timeout_s|dtype|optional|url|key_env|probe)$"
    r"|\w+\.microbatch_tokens$|model\.gradient_checkpointing$|sampling\.(slots$|vllm\.|pool\.)|qlearning\.ilql\.(strength|top_k)$"
)
# These change rounding or the order of floating-point sums; a url may be that of another server.
_NOT_BIT_EQUAL = re.compile(
    r".*\.(microbatch_tokens|gradient_checkpointing|slots|dtype|url|shard)$|sampling\.(vllm|pool)\."
)
# An input that may change: a reward function is fixed while a run goes on.
_REWARD_FILE = re.compile(r"reward\[\d+\]\.function$")
_ABSENT = "(absent)"


# What a process may have written before it was killed and config.yaml, the last, was there.
_BEFORE_CONFIG = {"lock", "environment.json", "status.json", "events.jsonl", "metrics.jsonl"}


@dataclass(frozen=True)
class Continuation:
    """How a run that is there goes on."""

    changed: list[Change]  # config keys that changed, and may
    grew: bool  # more cycles are asked for than before
    damaged: str | None  # what is wrong with the final/ of a run that had finished
    finished: bool  # nothing is left to do


def check_place(path: Path) -> None:
    """RunError where `path` cannot be a run directory: below a file, not writable, or full of other files."""
    check_writable(path)
    names = sorted(file.name for file in path.iterdir()) if path.exists() else []
    strange = [name for name in names if name not in _BEFORE_CONFIG and not name.endswith(".partial")]
    if strange and "config.yaml" not in names:
        raise RunError(
            f"{path} is not empty and not a run directory (it holds {strange[0]} and no config.yaml): its files "
            "would mix with the run's. Set run to a directory that does not exist yet."
        )


def check_writable(path: Path) -> None:
    """RunError where no directory `path` could be made or written to; makes none."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RunError(f"run={path}: {there} is a file, and a run needs a directory. Set run to another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"run={path}: {there} is not writable, so nothing could be saved. Set run to another place.")


def continuation(path: Path, command: str, config: Config, inputs: dict[str, str]) -> Continuation | None:
    """How this command continues the run in `path`; None where it starts one. RunError where it may do neither."""
    if not has_something_to_continue(path):
        return None
    status, environment = read_status(path), read_environment(path)
    if status.get("schema") != SCHEMA:
        raise RunError(
            f"{path} has schema {status.get('schema')}, but this version of tether writes schema {SCHEMA}: they "
            "would mix. Set run to another directory, or add --fresh to move this one aside."
        )
    if status["kind"] != command:
        raise RunError(
            f"{path} holds a run of `tether {status['kind']}`, but this is `tether {command}`: their files would "
            "mix. Set run to another directory, or add --fresh to move the old run aside."
        )
    changed = config_changes(path, recorded_config(path, command), config)
    check_inputs(path, environment["inputs"], inputs)
    grew = any(key == KINDS[command].total for key, _, _ in changed)
    ended, final = status["state"] == "finished", path / "final"
    damaged = damage(final) if ended else None
    if damaged and not _has_checkpoint(path):
        raise RunError(
            f"the run in {path} is finished, but {final} is damaged ({damaged}) and every checkpoint is gone: "
            "there is nothing to write the model from. Restore one of them from a copy, or add --fresh to move the "
            "run aside and start over."
        )
    return Continuation(changed, grew, damaged, finished=ended and not damaged and not grew)


def has_something_to_continue(path: Path) -> bool:
    """Whether a run in `path` did a cycle or more; one that did not is started over in place."""
    if not (path / "config.yaml").exists():
        return False
    if read_lines(path / "metrics.jsonl") or _has_checkpoint(path):
        return True
    return bool(read_status(path)["state"] == "finished")


def _has_checkpoint(path: Path) -> bool:
    return any((path / "checkpoints").glob("[!.]*[1-9]*"))  # -000000 is the start


def config_changes(path: Path, old: Config, new: Config) -> list[Change]:
    """What changed and may; RunError for the first change that may not."""
    found = changes(asdict(old), asdict(new))
    constant = asdict(new)["optim"]["schedule"] == "constant"
    for key, before, now in found:
        grew = key == kind_of(new).total and now > before
        switched = key == "evaluate.every" and bool(before) != bool(now)  # 0 holds no prompts out
        if (_MAY_CHANGE.match(key) and not switched) or (grew and constant):
            continue
        why = "its curves would mix two experiments"
        if grew:
            why = f"the learning rate falls towards the old end, so {key} may grow under optim.schedule: constant alone"
        if key.startswith("evaluate.") and not key.startswith("evaluate.gold"):
            why = "other prompts would be held out, and some of them have been trained on"
        raise RunError(
            f"{key} was {_shown(before)} when the run in {path} began and is {_shown(now)} now: {why}. Set it back to "
            "continue, or add --fresh to move the old run aside and start over."
        )
    return found


def check_inputs(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """RunError if a model or data file has other content than when the run began."""
    for key, before, now in changes(old, new):
        if not (_MAY_CHANGE.match(key) or _REWARD_FILE.match(key)):
            moved = re.search(r"@([0-9a-f]{40})$", str(before)) if key.startswith("model.policy") else None
            remedy = f"Set model.revision to {moved[1]}" if moved else "Restore it"
            raise RunError(
                f"{key} has other content than when the run in {path} began (was {before}, is {now}): its curves would "
                f"mix two experiments. {remedy}, or add --fresh to move the old run aside and start over."
            )


def reward_changes(old: dict[str, str], new: dict[str, str], events: list[dict[str, Any]]) -> list[Change]:
    """The files of reward functions that have other content than when the run last went on.

    old: hashes when the run began. events: what happened since; each change is there as `reward_changed`.
    """
    last = old | {e["key"]: e["new"] for e in events if e["event"] == "reward_changed"}
    return [(key, last[key], now) for key, now in new.items() if _REWARD_FILE.match(key) and last.get(key, now) != now]


def keeps_bits(change: Change) -> bool:
    """Whether the rest of the run is still bit-equal to an uninterrupted one after this change."""
    return not _NOT_BIT_EQUAL.match(change[0])


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The leaves that differ between two trees, by dotted key: reward[0].weight."""
    a, b = _leaves(old), _leaves(new)
    keys = dict.fromkeys([*a, *b])
    return [(k, a.get(k, _ABSENT), b.get(k, _ABSENT)) for k in keys if a.get(k, _ABSENT) != b.get(k, _ABSENT)]


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        children = [(f"{path}.{key}" if path else str(key), value) for key, value in node.items()]
    elif isinstance(node, list | tuple) and node:
        children = [(f"{path}[{i}]", value) for i, value in enumerate(node)]
    else:
        return {path: node}  # an empty mapping or list is a value like any other
    return {key: value for name, child in children for key, value in _leaves(child, name).items()}


def _shown(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value, ensure_ascii=False)
