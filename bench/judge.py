"""What a judge costs beside its endpoint: cached verdicts a second, and memory over a long queue.

    python bench/judge.py

A store of N pairs whose answers are all in the cache, both orders, as after a run whose labels were lost: `tether
judge` reads them and writes N labels, and asks nothing (no server is there). Seconds are by the clock on the wall and
by the processor, of reading alone and of the whole command; memory is how far the process's peak lies above what it had
before both. Linux only.
"""

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tether.config import JudgeConfig, JudgedConfig, JudgeSection
from tether.feedback.constitution import read_constitution
from tether.feedback.endpoint import Endpoint
from tether.feedback.judge import Queue, asker, comparison, judge
from tether.feedback.judge_cache import request_key
from tether.feedback.records import Answer, Item, Verdict
from tether.feedback.store import Store

URL = "http://127.0.0.1:9/v1"  # nobody is there
LETTERS = {"text": "A", "logprobs": {"A": -0.4, "B": -1.2, "The": -3.5}}


def config_of(folder: Path) -> JudgeConfig:
    section = JudgeSection("critic", base_url=URL, answer="logprobs")
    return JudgeConfig(section, JudgedConfig(str(folder / "preferences.db")))


def fill(folder: Path, pairs: int) -> None:
    """The store, and the answer to every question about it."""
    config, words = config_of(folder), Random(0)
    principles = read_constitution(config.judge.constitution)
    with Store(config.data.path, gold_fraction=0, repeat_fraction=0) as store:
        for first in range(0, pairs, 10_000):
            items = [
                Item(f"Question {i}: {words.random()}", tuple(Answer(f"{words.random()} " * 20) for _ in "ab"))
                for i in range(first, min(first + 10_000, pairs))
            ]
            store.add_items(items)
        with asker(config) as asked:
            assert isinstance(asked, Endpoint)
            connection: sqlite3.Connection = asked._cache._connection
            connection.execute("BEGIN")
            for number, _, _ in store.judge_queue(config.judge.annotator):
                question = comparison(store.item(number), number, config, principles)
                for order in question.orders:
                    key = request_key(URL, asked._body(question, order, "logprobs"), 0)
                    connection.execute("INSERT INTO answers VALUES (?, ?)", (key, json.dumps(LETTERS)))
            connection.execute("COMMIT")


def measure(folder: Path) -> None:
    """Print what reading the verdicts takes, and what the command takes that also writes them as labels."""
    import openai  # noqa: F401  imports are no part of it
    import torch  # noqa: F401

    config = config_of(folder)
    principles = read_constitution(config.judge.constitution)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on: imports took more for a moment
    before, wall, processor = memory("VmRSS"), time.perf_counter(), time.process_time()
    with Store(config.data.path) as store, asker(config) as asked:
        queue = Queue(store, config, principles, None)
        read = sum(isinstance(outcome, Verdict) for outcome in asked.compare(queue.comparisons()))
    seconds = time.perf_counter() - wall, time.process_time() - processor
    print(f"{read:,} verdicts read: {seconds[0]:.2f} s on the wall, {seconds[1]:.2f} s of the processor", flush=True)
    wall, processor = time.perf_counter(), time.process_time()
    done = judge(config)
    seconds = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{done.labels:,} labels: {seconds[0]:.2f} s on the wall, {seconds[1]:.2f} s of the processor; memory "
        f"{memory('VmHWM') - before:.1f} MiB above {before:.0f}"
    )


def memory(what: str) -> float:
    """MiB that this process has (VmRSS), or at most had (VmHWM); Linux alone says it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory() as root:
            fill(Path(root), pairs)
            subprocess.run([sys.executable, __file__, "--measure", root], check=True)


if __name__ == "__main__":
    main()
