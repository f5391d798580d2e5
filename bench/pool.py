"""What does a pool of samplers cost on one machine?

    python bench/pool.py [--model DIR] [--workers 2] [--rounds 7]       needs tether[ray]

Sampling a cycle, weights handed over first, by a pool of so many workers with a thread each, and by the local engine
with one thread and with as many, in turns on the same cores. Prints the median of the seconds, the pool's ratio to both
with its range over the rounds, and what the hand-over takes. The model is DIR's, or a small random one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import torch

from resume import make_model
from tether.config import ModelConfig, PoolConfig, SamplingConfig
from tether.models.policy import build_policy
from tether.samplers.local import LocalSampler
from tether.samplers.pool import PoolSampler
from tether.types import Prompt, Sampler, Sampling

PROMPTS, ANSWERS, NEW = 64, 8, 64  # prompts of a cycle, responses to each, tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; without one, a small random model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            make_model(Path(folder))
        path = args.model or folder
        policy, _, _ = build_policy(ModelConfig(policy=path), device=torch.device("cpu"), seed=0, with_critic=False)
        model = policy.model
        vocabulary = model.config.vocab_size
        prompts = [Prompt(tuple((7 * n + t) % vocabulary for t in range(4 + n % 13)), "…", n) for n in range(PROMPTS)]
        sampling = Sampling(max_new_tokens=NEW, responses_per_prompt=ANSWERS)

        def seconds(sampler: Sampler, threads: int, cycle: int) -> tuple[float, float]:
            """(all, of these the hand-over)."""
            torch.set_num_threads(threads)
            began = time.perf_counter()
            sampler.load_weights(model, cycle)
            loaded = time.perf_counter()
            sampler.generate(prompts, sampling, cycle=cycle)
            return time.perf_counter() - began, loaded - began

        local = LocalSampler(model)
        config = SamplingConfig("pool", pool=PoolConfig(args.workers))
        with closing(PoolSampler(model, config)) as pool:
            sides = (pool, 1), (local, 1), (local, args.workers)
            rounds = [[seconds(*side, n) for side in sides] for n in range(args.rounds + 1)][1:]  # the first: once
    pooled = [row[0][0] for row in rounds]
    handed = statistics.median(row[0][1] for row in rounds)
    print(f"{PROMPTS * ANSWERS} responses of {NEW} tokens")
    print(f"{args.workers} workers: {statistics.median(pooled):.2f} s, of these the hand-over {handed * 1e3:.0f} ms")
    for side, (_, threads) in enumerate(sides[1:], start=1):
        alone = [row[side][0] for row in rounds]
        ratios = sorted(p / a for p, a in zip(pooled, alone, strict=True))
        ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"local, {threads} threads: {statistics.median(alone):.2f} s; the pool takes {ratio} of that")


if __name__ == "__main__":
    main()
