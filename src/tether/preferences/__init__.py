"""Human preferences: the store where people's labels are collected, and the pairs that a reward model is fitted to.

    pairs.py      Pair, and how to hold some of them out            (loads tokenizers, so it is loaded when first used)
    store.py      Store: one SQLite file, its verbs                 records.py   the values that go in and come out
    schema.py     tables, connections, what went wrong              queue.py     who is asked what next, on which side
    labelling.py  recording a judgement, taking one back            reading.py   progress, labels, preference rows
    agreement.py  whether people can be trusted: α, κ, biases       export.py    JSONL for everybody else

Pages and the command line need no torch: nothing but pairs.py loads it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.preferences.pairs import ASSISTANT, Pair, split_pairs, split_transcripts
    from tether.preferences.records import Answer, Filters, Item, Task
    from tether.preferences.store import Store

_HOME = {
    **dict.fromkeys(("ASSISTANT", "Pair", "split_pairs", "split_transcripts"), "tether.preferences.pairs"),
    **dict.fromkeys(("Answer", "Filters", "Item", "Task"), "tether.preferences.records"),
    "Store": "tether.preferences.store",
}

__all__ = [
    "ASSISTANT",
    "Answer",
    "Filters",
    "Item",
    "Pair",
    "Store",
    "Task",
    "split_pairs",
    "split_transcripts",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tether.preferences' has no attribute {name!r}")
