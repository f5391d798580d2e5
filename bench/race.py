"""A race to the same held-out objective: stories260K learns to please VADER, by our PPO with a critic and with a group
baseline, TRL's PPO and TRL's RLOO.

    python bench/race.py --model DIR [--seeds 0 1 2 3 4] [--against trl-ppo trl-rloo] [--choose] [--peers .peers]

Everyone maximizes score − β·KL(policy‖initial), β = 0.02 a nat: the objective that all three are given. Everyone trains
on the same openings and keeps a copy of the policy now and then; afterwards one sampler draws 256 stories from every
copy, for 16 openings that nobody trained on, and the copy's objective is measured on those. The finish line of a pair
is 90 % of the weaker one's gain, so both cross it. A finish line in the score alone would be crossed first by whoever
leaves English fastest. The clock runs from the first step; loading counts for nobody. Ours includes checkpoints and
rollout files; the peers' stands still while they save.

Each side runs with the best of three settings, found with --choose on seed 0. Needs `bench/peers/setup.sh trl-ppo trl`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import tether
from tether.config import (
    CheckpointConfig,
    EvaluateConfig,
    HeldOutConfig,
    KLConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardSourceConfig,
    SamplingConfig,
)

BENCH = Path(__file__).resolve().parent
EXAMPLE = BENCH.parent / "examples" / "stories"
HELD_OUT, SAMPLES, NEW = 16, 16, 64  # openings kept from training; stories each; tokens a story
BETA = 0.02  # score units a nat

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "critic": [
        {"cycles": 12, "batch": 64, "lr": 3e-4},
        {"cycles": 12, "batch": 64, "lr": 4e-4},
        {"cycles": 6, "batch": 128, "lr": 5e-4},
    ],
    "group": [
        {"cycles": 12, "batch": 64, "lr": 3e-4},
        {"cycles": 12, "batch": 64, "lr": 5e-4},
        {"cycles": 6, "batch": 128, "lr": 5e-4},
    ],
    "trl-ppo": [
        {"cycles": 12, "batch": 64, "minibatches": 1, "epochs": 1, "lr": 3e-4, "lam": 1.0},
        {"cycles": 12, "batch": 64, "minibatches": 1, "epochs": 1, "lr": 5e-4, "lam": 1.0},
        {"cycles": 6, "batch": 128, "minibatches": 1, "epochs": 1, "lr": 5e-4, "lam": 1.0},
    ],
    "trl-rloo": [
        {"cycles": 12, "batch": 64, "iterations": 1, "generations": 8, "lr": 3e-4},
        {"cycles": 12, "batch": 64, "iterations": 1, "generations": 8, "lr": 5e-4},
        {"cycles": 6, "batch": 128, "iterations": 1, "generations": 8, "lr": 5e-4},
    ],
}
BEST = {"critic": 1, "group": 2, "trl-ppo": 1, "trl-rloo": 1}  # which of them, by --choose
OURS: dict[str, dict[str, Any]] = {  # what the two of ours add
    "critic": {"lam": 1.0, "value_coef": 0.1},
    "group": {"advantage": "group", "responses_per_prompt": 8},
}
COPIES = 6  # of the policy, over a run


@dataclass(frozen=True)
class Point:
    """A copy of the policy, on the held-out openings."""

    seconds: float
    score: float
    kl: float  # nats per response

    @property
    def objective(self) -> float:
        return self.score - BETA * self.kl


def curve(side: str, setting: dict[str, Any], model: str, seed: int, peers: Path) -> list[Point]:
    """What a side reaches over seconds of training."""
    openings = [json.loads(line)["prompt"] for line in (EXAMPLE / "prompts.jsonl").read_text().splitlines()]
    held_out, train = openings[:HELD_OUT], openings[HELD_OUT:]
    every = max(1, setting["cycles"] // COPIES)
    with tempfile.TemporaryDirectory() as folder:
        if side in OURS:
            copies = ours(side, setting, model, seed, train, every, Path(folder))
        else:
            copies = peer(side, setting, model, seed, train, every, Path(folder), peers)
        return measure(model, copies, held_out, Path(folder))


def ours(
    side: str, setting: dict[str, Any], model: str, seed: int, train: list[str], every: int, folder: Path
) -> list[tuple[float, str]]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in train))
    config = tether.load_config(EXAMPLE / "ppo.yaml")
    assert isinstance(config, PPOConfig)
    config = replace(
        config, run=str(folder / "run"), seed=seed, model=replace(config.model, policy=model),
        prompts=replace(config.prompts, path=str(prompts)),
        ppo=PPOSection(
            kl=KLConfig(coef=BETA), cycles=setting["cycles"], batch=setting["batch"], minibatch=setting["batch"],
            epochs=1, **OURS[side],
        ),
        optim=replace(config.optim, lr=setting["lr"], critic_lr=1e-4 if side == "critic" else None),
        evaluate=HeldOutConfig(every=0), checkpoint=CheckpointConfig(every=every, keep=10**6),
    )  # fmt: skip
    run = tether.ppo(config)
    paths = sorted((run.path / "checkpoints").iterdir())
    copies = [(path / "state.json").stat().st_mtime for path in paths]
    began = copies[0] - sum(v for m in run.metrics[:every] for k, v in m.items() if k.startswith("time/"))
    return [(written - began, str(path / "policy")) for written, path in zip(copies, paths, strict=True)]


def peer(
    side: str, setting: dict[str, Any], model: str, seed: int, train: list[str], every: int, folder: Path, peers: Path
) -> list[tuple[float, str]]:
    environment = peers / ("trl-ppo" if side == "trl-ppo" else "trl")
    job = {
        **setting,
        "model": model,
        "seed": seed,
        "prompts": train,
        "every": every,
        "new": NEW,
        "beta": BETA,
        "to": str(folder),
    }
    script = BENCH / "peers" / f"race_{side.replace('-', '_')}.py"
    done = subprocess.run(
        [str(environment.absolute() / "bin" / "python"), str(script), json.dumps(job)],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE)}, text=True, capture_output=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} ended: {done.stderr[-2000:]}")
    return [(seconds, path) for seconds, path in json.loads((folder / "copies.json").read_text())]


def measure(model: str, copies: list[tuple[float, str]], held_out: list[str], folder: Path) -> list[Point]:
    """The initial model and every copy of it, by one sampler with the same random numbers."""
    prompts = folder / "held_out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in held_out))
    found = tether.evaluate(
        EvaluateConfig(
            models=[path for _, path in copies], baseline=model, prompts=PromptsConfig(str(prompts)), samples=SAMPLES,
            reward=[RewardSourceConfig(function="sentiment.py:sentiment")], seed=9,
            sampling=SamplingConfig(max_new_tokens=NEW),
        )
    ).results  # fmt: skip
    seconds = [0.0] + [seconds for seconds, _ in copies]
    return [Point(s, r.score.mean, r.kl.mean) for s, r in zip(seconds, found, strict=True)]


def crossing(points: list[Point], target: float) -> float:
    """Seconds at which the curve first reaches `target`, between its points in a straight line."""
    for before, after in itertools.pairwise(points):
        if after.objective >= target:
            return before.seconds + (after.seconds - before.seconds) * (target - before.objective) / (
                after.objective - before.objective
            )
    return float("inf")


def race(a: list[Point], b: list[Point]) -> tuple[float, float, float]:
    """(finish line, seconds of a, seconds of b)."""
    start = a[0].objective
    gain = min(max(p.objective for p in points) - start for points in (a, b))
    line = start + 0.9 * gain
    return line, crossing(a, line), crossing(b, line)


def show(side: str, points: list[Point]) -> None:
    print(f"  {side:9}" + " ".join(f"{p.seconds:.0f}s {p.score:.2f}/{p.kl:.0f}" for p in points), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of stories260K")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--against", nargs="*", default=["trl-ppo", "trl-rloo"], choices=["trl-ppo", "trl-rloo"])
    parser.add_argument("--choose", action="store_true", help="run all three settings of every side on seed 0")
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    args = parser.parse_args()
    model, peers = str(Path(args.model).resolve()), args.peers.resolve()
    sys.path.insert(0, str(EXAMPLE))
    os.chdir(EXAMPLE)  # the example's reward function is named relative to it
    if args.choose:
        for side in (*OURS, *args.against):
            for setting in SETTINGS[side]:
                print(setting)
                show(side, curve(side, setting, model, 0, peers))
        return
    ratios: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        print(f"seed {seed}")
        curves = {}
        for side in (*OURS, *args.against):
            curves[side] = curve(side, SETTINGS[side][BEST[side]], model, seed, peers)
            show(side, curves[side])
        for theirs, mine in itertools.product(args.against, OURS):
            line, a, b = race(curves[mine], curves[theirs])
            ratios.setdefault((mine, theirs), []).append(b / a)
            print(f"  to {line:.3f}: {mine} {a:.0f} s, {theirs} {b:.0f} s: {b / a:.1f} ×", flush=True)
    for (mine, theirs), found in ratios.items():
        print(
            f"h  with a {mine} {statistics.median(found):.1f} × {theirs} [{min(found):.1f}, {max(found):.1f}] "
            f"over {len(found)} seeds"
        )


if __name__ == "__main__":
    main()
