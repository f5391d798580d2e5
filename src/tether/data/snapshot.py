"""A store of labels as a data set: what a run reads of it, and how it reads the same again.

Labeling goes on while a reward model is trained. A run writes down the number of the newest event when it begins; when
it is resumed it reads the store as of that event. The hash beside the number is of the rows themselves: should they
differ all the same (another store in that place, a restored backup), the run is not resumed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tether.config import LabelsConfig, PairsConfig
from tether.data.table import Table, read_table
from tether.errors import ConfigError, DataError
from tether.feedback.records import Filters, Preferences
from tether.feedback.schema import is_store
from tether.feedback.store import Store

_PINNED = re.compile(r"labels up to event (\d+), sha256:")


def pin_labels(config: PairsConfig, recorded_inputs: Mapping[str, str]) -> str | None:
    """What a run reads of the store in data.path, for its inputs; None where the path is not a store.

    recorded_inputs: the inputs of the run that is continued, {} for a new one.
    """
    if not _holds_labels(config):
        return None
    as_of = pinned_event(recorded_inputs.get("data.path"))
    with Store(config.path, create=False) as store:
        newest = store.last_event()
        if as_of is None or as_of > newest:  # of another store: the hash will tell
            as_of = newest
        rows = store.preferences(Filters(**asdict(config.labels)), as_of=as_of).rows
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return f"labels up to event {as_of}, sha256:{digest.hexdigest()[:16]}"


def pinned_event(pinned: str | None) -> int | None:
    """The event in what `pin_labels` gave."""
    found = _PINNED.match(pinned or "")
    return int(found[1]) if found else None


def read_pairs(config: PairsConfig, pinned: str | None = None) -> Table:
    """The rows of data.path; of a store, those that its filters leave, said on stderr with what they do not.

    pinned: what `pin_labels` gave; None reads the labels that stand now.
    """
    if not _holds_labels(config):
        return read_table(config.path, config.split, config.limit)
    with Store(config.path, create=False) as store:
        found = store.preferences(Filters(**asdict(config.labels)), as_of=pinned_event(pinned))
    print(_summary(config.path, found), file=sys.stderr)
    if all(row["probability"] == 0.5 for row in found.rows):
        under = " under data.labels" if config.labels != LabelsConfig() else ""
        raise DataError(
            f"{config.path} has no label by which one answer is better than another{under}: there is nothing "
            "to learn. Label some pairs (tether studio), or widen data.labels (judges: true takes those of judges)."
        )
    return Table(config.path, found.rows[: config.limit])


def _holds_labels(config: PairsConfig) -> bool:
    """Whether data.path is a store; ConfigError for filters on anything else."""
    file = Path(config.path)
    if file.is_file() and is_store(file):
        return True
    if config.labels != LabelsConfig():
        raise ConfigError(
            f"data.labels is set, but data.path={config.path} is not a store of labels: nothing would be filtered. "
            "Name the store (preferences.db), or leave data.labels out."
        )
    return False


def _summary(path: str, found: Preferences) -> str:
    """N pairs, and what was labeled without becoming one."""
    people = len({row["annotator"] for row in found.rows})
    counts = {"skips": found.skips, "on gold items": found.gold, "on repeats": found.repeats}
    left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    ties = f", of them {found.ties} ties" if found.ties else ""
    end = f"; left out: {left_out}" if left_out else ""
    return f"{path}: {len(found.rows)} pairs by {people} annotators{ties}{end}"
