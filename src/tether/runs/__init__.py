"""The run directory, schema 1: the one thing that trainers, studio, report and doctor share.

`RunDirectory` is the trainer's side: it locks the directory, decides whether this command may continue what is there,
and writes. `Run` is everybody else's: it only reads, also while the run is still going.

    config.yaml       the resolved config                   metrics.jsonl   one object a cycle (sft, reward: a step)
    environment.json  versions, hardware, hashes            rollouts/       cycle-000012.parquet, a row a response
    status.json       running, finished, stopped, failed    evaluations/    likewise, on the fixed prompts
    events.jsonl      resumes, changes, alarms              checkpoints/    see tether.train.checkpoint
    best/             the best evaluated policy of PPO, with best.json: its cycle and score
    lock              flock: one writer at a time           final/          the last policy, a Hugging Face directory

What `tether evaluate` writes is read by `EvaluationDir`: evaluation.json, and answers/model-00.parquet of each model.
"""

from tether.runs.directory import RunDirectory, aside, recorded_inputs
from tether.runs.files import SCHEMA, hash_files, sha256, to_plain
from tether.runs.reader import EvaluationDir, Run, short_name

__all__ = [
    "SCHEMA",
    "EvaluationDir",
    "Run",
    "RunDirectory",
    "aside",
    "hash_files",
    "recorded_inputs",
    "sha256",
    "short_name",
    "to_plain",
]
