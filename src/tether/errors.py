"""What can go wrong, drawn as a tree.

    TetherError
    ├── ConfigError        a key, a value, or two keys that contradict each other
    ├── DataError          a file, a line or a column
    ├── ModelError         a model directory, a tokenizer, or two that do not fit together
    ├── RewardError        a reward source that raised, hung or answered something unusable
    ├── RunError           a run directory: locked, of another command, changed, corrupted
    ├── StoreError         the store of labels: missing, foreign, locked, damaged, on a full disk
    │   └── LabelError     one judgment that cannot be recorded; the store is well
    ├── BatchError         tensors of the wrong shape handed to a batch type
    ├── TrainingError      training itself broke: not-finite numbers, a self-check that failed
    │   └── EngineError    a sampling engine of processes of its own that ended, or failed; the policy is well
    └── Interrupted        a signal asked us to stop, and we stopped after saving

Every message says three things: the value, what would go wrong because of it, and what to do. `exit_code` is what the
command line returns: 2 for the user's mistake, 3 for a stop by signal, 1 for anything else. The helpers that
messages are made with stand at the end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class TetherError(Exception):
    """The root: catch this to catch everything that Tether raises on purpose."""

    exit_code = 1


class ConfigError(TetherError):
    """A key that does not exist, a value out of range, or keys that contradict each other."""

    exit_code = 2


class DataError(TetherError):
    """A data file, line or column that cannot be used; names file, line and column."""

    exit_code = 2


class ModelError(TetherError):
    """A model directory or tokenizer that cannot be used."""

    exit_code = 2


class RewardError(TetherError):
    """A reward source that raised, timed out, or answered with something that is not a score; names the row."""

    exit_code = 2


class RunError(TetherError):
    """A run directory that cannot be written, continued or read."""

    exit_code = 2


class StoreError(TetherError):
    """A store of labels that cannot be read or written, or that is asked for what it does not hold."""

    exit_code = 2


class LabelError(StoreError):
    """A judgment that cannot be recorded: not this annotator's item, not a choice it has, a key used before."""


class BatchError(TetherError):
    """Shapes that do not fit together: a mistake in the calling code, found at the door of a batch type."""


class TrainingError(TetherError):
    """Training itself broke: loss or gradient not finite too often, or a self-check out of bounds."""


class EngineError(TrainingError):
    """A sampling engine with processes of its own that ended, or raised. What was learned until then is saved."""


class Interrupted(TetherError):
    """Stopped by a signal after saving; the same command continues."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?', or '' if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def did_you_mean_path(path: str) -> str:
    """' Did you mean …?' with what the same folder holds, or where the path breaks off; '' if nothing is near."""
    folder = Path(path).parent
    if folder.is_dir():
        return did_you_mean(Path(path).name, (entry.name for entry in folder.iterdir()))
    while not folder.is_dir():
        folder = folder.parent
    return f" The path breaks off after {folder.resolve()}."


def did_you_mean_final(path: str) -> str:
    """' Did you mean …?' where `path` is a run directory with its model inside, or holds an ensemble; else ''."""
    final = Path(path) / "final"
    for folder in (Path(path), final):
        if (folder / "member-1" / "config.json").is_file():
            return f" {folder} holds an ensemble: list its members as `models: [{folder / 'member-1'}, …]`."
    return f" Did you mean {final}?" if (final / "config.json").is_file() else ""


def first_line(error: BaseException) -> str:
    """The first line of what another library said, for use inside our own message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def last_line(error: BaseException) -> str:
    """The last line, where another library says on many how it came about, and at the end why."""
    lines = str(error).strip().splitlines()
    return (lines[-1].strip() if lines else type(error).__name__).rstrip(".")
