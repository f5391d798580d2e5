"""How much of a slow sampler does `ppo.ahead: 1` hide?

    python bench/ahead.py [--model DIR] [--wait 0.5 2.0]

PPO on a sampler that answers at once and then waits, as an engine on other hardware would be waited for. For every
wait, seconds of a cycle without and with `ahead`, over the larger of what sampling and learning take alone: 1 is the
best that can be, the sum of both over the larger what is had without. The model is stories260K's, or a random one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import tether
from resume import make_model
from tether.config import (
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    SamplingConfig,
)
from tether.samplers.local import LocalSampler
from tether.types import Completions, Prompt, Sampling

CYCLES = 8


class Waits:
    """The local engine, then a wait."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s, self.seconds = wait_s, list[float]()
        self.engine: LocalSampler | None = None

    def load_weights(self, weights: Any, version: int) -> None:
        self.engine = self.engine or LocalSampler(weights, copied=True)
        self.engine.load_weights(weights, version)

    def generate(self, prompts: list[Prompt], sampling: Sampling, *, cycle: int, first: int = 0) -> Completions:
        assert self.engine is not None
        began = time.perf_counter()
        found = self.engine.generate(prompts, sampling, cycle=cycle, first=first)
        time.sleep(self.wait_s)
        self.seconds.append(time.perf_counter() - began)
        return found


class Clock:
    """When each cycle ended."""

    def __init__(self) -> None:
        self.ended = list[float]()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self.ended.append(time.perf_counter())


def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def cycle_seconds(folder: Path, model: Path, wait_s: float, ahead: int) -> tuple[float, float, float]:
    """Medians of (a cycle, its sampling, its learning), seconds; the first two cycles are left out."""
    sampler, clock = Waits(wait_s), Clock()
    config = PPOConfig(
        run=str(folder / f"{wait_s}-{ahead}"), device="cpu", model=ModelConfig(policy=str(model)),
        prompts=PromptsConfig(path=str(folder / "prompts.jsonl")), sampling=SamplingConfig(max_new_tokens=24),
        ppo=PPOSection(cycles=CYCLES, batch=32, minibatch=16, epochs=4, ahead=ahead), optim=OptimConfig(lr=1e-4),
        log=LogConfig(tensorboard=False, rollouts_every=0), checkpoint=CheckpointConfig(every=10**6),
        evaluate=HeldOutConfig(every=0),
    )  # fmt: skip
    with redirect_stdout(sys.stderr):
        run = tether.ppo(config, reward=score, sampler=sampler, sinks=[clock])
    cycles = [b - a for a, b in zip(clock.ended[1:-1], clock.ended[2:-1], strict=False)]
    learning = [m["time/forward_s"] + m["time/score_s"] + m["time/update_s"] for m in run.metrics[2:-1]]
    return statistics.median(cycles), statistics.median(sampler.seconds[2:]), statistics.median(learning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--wait", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        print("| wait | sampling | learning | a cycle, over the larger | ahead, over the larger |")
        print("|--:|--:|--:|--:|--:|")
        for wait_s in args.wait:
            plain, sampling, learning = cycle_seconds(folder, args.model or folder / "model", wait_s, 0)
            larger = max(sampling, learning)
            ahead, sampled, learned = cycle_seconds(folder, args.model or folder / "model", wait_s, 1)
            print(
                f"| {wait_s:g} s | {sampling:.2f} s | {learning:.2f} s | {plain:.2f} s, {plain / larger:.2f} | "
                f"{ahead:.2f} s, {ahead / max(sampled, learned):.2f} |",
                flush=True,
            )


PROMPTS = ["Once upon a time", "One day, a boy", "The cat", "A big dog", "Tom and Sue", "In the park", "Ben", "Lily"]

if __name__ == "__main__":
    main()
