"""A real language model and a reward that comes from people: stories260K learns to write happier stories.

Trains examples/stories with several seeds, then compares on the same openings: one sample of the trained model with the
best of 8 of the start model (the strongest thing one can do without training), the KL that was spent, and whether the
stories still differ from one another (distinct-2: distinct pairs of words over all pairs).

    python bench/stories.py --model DIR [--seeds 0 1 2 3 4] [--paths default avx2] [--plot docs/stories.svg]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import tether
from chart import Line, draw
from paths import Row, add_options, figures, ranged, sweep
from tether.config import PPOConfig
from tether.math import best_of_n_kl_estimate, best_of_n_score

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "stories"
N, KEPT = 8, 256  # samples an opening; samples whose variety is measured


def measure(model: str, seed: int, cycles: int | None) -> Row:
    """A run's figures; kl in nats per response, variety over the start's, curves as (KL, score)."""
    config = tether.load_config(EXAMPLE / "ppo.yaml")
    assert isinstance(config, PPOConfig)
    openings = [p["prompt"] for p in _read(config.prompts.path)]
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=f"{folder}/run", seed=seed, model=replace(config.model, policy=model))
        if cycles:
            config = replace(config, ppo=replace(config.ppo, cycles=cycles))
        began = time.monotonic()
        run = tether.ppo(config)
        minutes = (time.monotonic() - began) / 60
        before = [g.completion for g in tether.generate(model, openings, samples=N, max_new_tokens=64, seed=seed)]
        after = [
            g.completion for g in tether.generate(str(run.final), openings, samples=N, max_new_tokens=64, seed=seed)
        ]
        metrics = run.metrics
    from sentiment import sentiment

    start, end = sentiment(before), sentiment(after)
    choosing = [best_of(torch.tensor(start).view(-1, N), n) for n in range(1, N + 1)]
    return Row(
        minutes=minutes,
        score=sum(end) / len(end),
        best_of_8=choosing[-1][1],
        kl=metrics[-1]["kl/ref_mean"],
        variety=distinct_2(after, seed) / distinct_2(before, seed),
        curve=[(m["kl/ref_mean"], m["reward/score_mean"]) for m in metrics],
        best_of_n=choosing,
        samples=[(openings[i], before[i * N], after[i * N]) for i in range(4)],
    )


def _read(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / path).read_text().splitlines()]


def best_of(scores: torch.Tensor, n: int) -> tuple[float, float]:
    """(KL, expected score) of the best of n, mean over openings; scores [openings, N]."""
    return float(best_of_n_kl_estimate(scores, n=n).mean()), float(best_of_n_score(scores, n=n).mean())


def distinct_2(texts: list[str], seed: int) -> float:
    """Distinct pairs of neighboring words over all pairs, in KEPT texts cut to an equal number of words."""
    words = [t.split() for t in random.Random(seed).sample(texts, KEPT)]
    pairs = [pair for w in words for pair in itertools.pairwise(w[:30])]
    return len(set(pairs)) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of stories260K")
    add_options(parser, seeds=5, to="runs/bench-stories")
    parser.add_argument("--cycles", type=int)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model, cycles = str(Path(args.model).resolve()), args.cycles
    args.to, plot = args.to.resolve(), args.plot.resolve() if args.plot else None
    os.chdir(EXAMPLE)
    sys.path.insert(0, str(EXAMPLE))
    if result := os.environ.get("RESULT"):
        Path(result).write_text(json.dumps(measure(model, args.seeds[0], cycles)))
        return
    one = [__file__, "--model", model, *(["--cycles", str(cycles)] if cycles else [])]
    rows = sweep(args, lambda seed, path: figures([*one, "--seeds", str(seed)], path), cycles=cycles)
    print(
        "| seed | CPU path | minutes | trained, one sample | start, best of 8 | start, one sample | KL, nats "
        "| distinct-2 against the start |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['seed']} | {r['path']} | {r['minutes']:.1f} | {r['score']:.3f} | {r['best_of_8']:.3f} "
            f"| {r['best_of_n'][0][1]:.3f} | {r['kl']:.1f} | {r['variety']:.0%} |"
        )
    for name, form in (("score", ".3f"), ("best_of_8", ".3f"), ("kl", ".1f"), ("variety", ".0%"), ("minutes", ".1f")):
        print(f"{name:10}{ranged((r[name] for r in rows), form)}")
    for opening, before, after in rows[0]["samples"]:
        print(f"\n{opening}\n  before: {' '.join(before.split())}\n  after:  {' '.join(after.split())}")
    if plot:
        lines = [Line(f"PPO, seed {r['seed']}", sorted(r["curve"])) for r in rows]
        lines.append(Line("best of n = 1 … 8", rows[0]["best_of_n"]))
        draw(plot, lines, x="KL to the start model, nats per response", y="sentiment of one sample")


if __name__ == "__main__":
    main()
