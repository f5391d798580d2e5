"""Preferences of people and of judges: the store where labels are collected, and how far they can be trusted.

    store.py       Store: one SQLite file, its verbs                records.py   the values that go in and come out
    schema.py      tables, connections, what went wrong             queue.py     who is asked what next, on which side
    judgments.py  recording a judgment, taking one back           reading.py   progress, labels, preference rows
    agreement.py   whether people can be trusted: α, κ, biases      export.py    JSONL for everybody else
    items.py       `tether label`: where the items come from
    judge.py       `tether judge`: a model that labels        verdict.py   what it is asked, and how it is read
    endpoint.py    asked over HTTP, local_judge.py in this process; judge_cache.py what was paid; constitution.py
    client.py      requests to an endpoint: limits, retries
    revise.py      `tether revise`: answers rewritten        chains.py    what is asked; chain_file.py what is kept
    reviser.py     who is asked                              progress.py  how far a command is

Pages and the command line need no torch: nothing here loads it but what a model answers
in: `items.py`, `judge.py`, `local_judge.py`, `chains.py`, `revise.py` and `reviser.py`.
"""
