"""Does a figure hold with another seed, and on another CPU? Runs of seeds × CPU paths, kept as they are done.

A CPU path is what torch's kernels may use: `default` is the best of this CPU, `avx2` is ATEN_CPU_CAPABILITY=avx2. Sums
round differently there, and training carries the difference on. A CPU whose best is AVX2 has one path of the two:
`plain`, kernels without AVX, is another. torch reads the variable once, so every run is a process of its own; it
writes its figures as JSON to the file that the variable RESULT names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PATHS = {"default": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2"}, "plain": {"ATEN_CPU_CAPABILITY": "default"}}
Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, *, seeds: int, to: str) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["default", "avx2"])
    parser.add_argument("--to", type=Path, default=Path(to), help="results.jsonl and the runs; done runs are kept")


def sweep(args: argparse.Namespace, run: Callable[[int, str], Row], **name: Any) -> list[Row]:
    """The rows of args.seeds × args.paths, those in results.jsonl first; run(seed, path) makes a new one.

    name: further keys that tell a row from others, e.g. example="polite".
    """
    args.to.mkdir(parents=True, exist_ok=True)
    file = args.to / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        for path in args.paths:
            key = {"seed": seed, "path": path} | name
            if not any(key.items() <= row.items() for row in done):
                done.append(key | run(seed, path))
                with file.open("a") as out:
                    out.write(json.dumps(done[-1]) + "\n")
    order = list(PATHS)
    ours = [row for row in done if name.items() <= row.items()]
    return sorted(ours, key=lambda row: (row["seed"], order.index(row["path"])))


def figures(command: Iterable[str], path: str) -> Row:
    """What `python COMMAND`, on this CPU path, writes to the file RESULT."""
    inherited = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = inherited | PATHS[path] | {"RESULT": str(result)}
        subprocess.run([sys.executable, *command], env=environment, check=True)
        return json.loads(result.read_text())


def ranged(numbers: Iterable[float], form: str = ".1%") -> str:
    """The lowest and the highest."""
    numbers = list(numbers)
    return f"{min(numbers):{form}}–{max(numbers):{form}}"
