"""What does a pool of samplers cost on one machine?

    python bench/pool.py [--model DIR] [--workers 2] [--rounds 7]       needs tether[ray]

Sampling a cycle, weights handed over first, by a pool of so many workers with a thread each, and by the local engine
with as many threads, in turns on the same cores. Prints the median of the seconds, their ratio with its range over the
rounds, and what the hand-over takes. The model is stories260K's, or a random one.
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
    parser.add_argument("--model", help="a directory; without one, a random model of seven million weights")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or str(make_model(Path(folder)))
        policy, _, _ = build_policy(ModelConfig(policy=path), device=torch.device("cpu"), seed=0, with_critic=False)
        model = policy.model
        vocabulary = model.config.vocab_size
        prompts = [Prompt(tuple((7 * n + t) % vocabulary for t in range(4 + n % 13)), "…", n) for n in range(PROMPTS)]
        sampling = Sampling(max_new_tokens=NEW, responses_per_prompt=ANSWERS)

        def seconds(sampler: Sampler, cycle: int) -> tuple[float, float]:
            """(all, of these the hand-over)."""
            began = time.perf_counter()
            sampler.load_weights(model, cycle)
            loaded = time.perf_counter()
            sampler.generate(prompts, sampling, cycle=cycle)
            return time.perf_counter() - began, loaded - began

        local = LocalSampler(model)
        config = SamplingConfig("pool", pool=PoolConfig(args.workers))
        with closing(PoolSampler(model, config)) as pool:
            for sampler in (local, pool):
                seconds(sampler, 0)  # what is done once
            rounds = [(seconds(local, n), seconds(pool, n)) for n in range(1, args.rounds + 1)]
    ratios = sorted(pool / local for (local, _), (pool, _) in rounds)
    one, many = (statistics.median(r[side][0] for r in rounds) for side in (0, 1))
    handed = statistics.median(r[1][1] for r in rounds)
    print(f"{PROMPTS * ANSWERS} responses of {NEW} tokens: local {one:.2f} s, {args.workers} workers {many:.2f} s")
    print(f"ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]; hand-over {handed * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
