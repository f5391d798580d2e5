"""Whether a command continues the run that is there: same config, same inputs, but for what cannot spoil the curves."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tether.config import Config
from tether.errors import RunError

Change = tuple[str, Any, Any]  # dotted key, value when the run began, value now

# `run` is where the directory is now: it may have been moved.
_MAY_CHANGE = re.compile(
    r"run$|(log|checkpoint|evaluate)(\.|$)|reward\[\d+\]\.timeout_s$"
    r"|(ppo|sft|reward_model)\.microbatch_tokens$|model\.gradient_checkpointing$"
)
# The first two change the order of floating-point sums, the others which prompts are held out of training.
_NOT_BIT_EQUAL = re.compile(r".*\.(microbatch_tokens|gradient_checkpointing)$|evaluate\.(prompts|count)$")
# An input that may change: a reward function is mended while a run goes on.
_REWARD_FILE = re.compile(r"reward\[\d+\]\.function$")
_ABSENT = "(absent)"


def config_changes(path: Path, old: Config, new: Config) -> list[Change]:
    """What changed and may; RunError for the first change that may not."""
    found = changes(asdict(old), asdict(new))
    constant = asdict(new)["optim"]["schedule"] == "constant"
    for key, before, now in found:
        grew = key == "ppo.cycles" and now > before
        if _MAY_CHANGE.match(key) or (grew and constant):
            continue
        why = "its curves would mix two experiments"
        if grew:
            why = "the learning rate falls towards the old end, so cycles may grow under optim.schedule: constant alone"
        raise RunError(
            f"{key} was {_shown(before)} when the run in {path} began and is {_shown(now)} now: {why}. Set it back to "
            "continue, or add --fresh to move the old run aside and begin anew."
        )
    return found


def check_inputs(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """RunError if a model or data file has other content than when the run began."""
    for key, before, now in changes(old, new):
        if not (_MAY_CHANGE.match(key) or _REWARD_FILE.match(key)):
            raise RunError(
                f"{key} has other content than when the run in {path} began (was {before}, is {now}): its curves would "
                "mix two experiments. Restore it, or add --fresh to move the old run aside and begin anew."
            )


def reward_changes(old: dict[str, str], new: dict[str, str], events: list[dict[str, Any]]) -> list[Change]:
    """The files of reward functions that have other content than when the run last went on.

    old: hashes when the run began. events: what happened since; each change is there as `reward_changed`.
    """
    last = old | {e["key"]: e["new"] for e in events if e["event"] == "reward_changed"}
    return [(key, last[key], now) for key, now in new.items() if _REWARD_FILE.match(key) and last.get(key, now) != now]


def keeps_bits(change: Change) -> bool:
    """Whether the rest of the run is still bit-equal to an uninterrupted one after this change."""
    key, before, now = change
    if key == "evaluate.every":
        return bool(before) == bool(now)  # 0 holds no prompts out
    return not _NOT_BIT_EQUAL.match(key)


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
