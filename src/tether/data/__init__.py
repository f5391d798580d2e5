"""Data sets: rows out of JSONL, Parquet, a store of labels or the hub; prompts, examples and pairs out of rows.

Column names are the ecosystem's: `prompt`; `prompt, chosen, rejected`, or whole transcripts in `chosen, rejected`;
`messages`, `prompt, completion`, or `text`. A prompt or completion is text or a list of chat messages.

Nothing is skipped silently. What cannot be used raises DataError with file, line, column and what to write instead;
what the user asked to drop or cut is counted on stderr.
"""

from tether.data.examples import Example, load_examples
from tether.data.labels import pin_labels
from tether.data.pairs import load_pairs
from tether.data.prompts import load_prompts
from tether.data.table import read_rows
from tether.preferences import Pair

__all__ = ["Example", "Pair", "load_examples", "load_pairs", "load_prompts", "pin_labels", "read_rows"]
