"""Data sets and tokens: rows out of JSONL, Parquet, a store of labels or the hub; prompts, examples and pairs out of
rows; ids out of text and chat messages, and text out of ids.

Column names are the ecosystem's: `prompt`; `prompt, chosen, rejected`, or whole transcripts in `chosen, rejected`;
`messages`, `prompt, completion`, or `text`. A prompt or completion is text or a list of chat messages.

Nothing is skipped silently. What cannot be used raises DataError with file, line, column and what to write instead;
what the user asked to drop or cut is counted on stderr.
"""
