"""Does `ppo.kl.target` hold? A real language model learns to please VADER's lexicon under five settings.

Each setting is run with `kl.horizon: null` (the default) and with Ziegler's formula at two horizons. Cycles count from
the second tenth of the run on. Printed: the share within 25 % of the target, of single cycles and of means of five.

    python bench/kl_target.py --model DIR [--settings 1 2] [--horizons none] [--prompts FILE] [--seed 0] [--curves]

DIR: stories260K. Another model needs prompts that suit it, a JSONL file with a column `prompt`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

os.environ["HF_HUB_OFFLINE"] = "1"

import tether
from tether.config import (
    CheckpointConfig,
    HeldOutConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardSourceConfig,
    SamplingConfig,
)

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "stories"
WITHIN = 0.25


@dataclass(frozen=True)
class Setting:
    batch: int
    lr: float
    target: float  # nats per response
    cycles: int
    coef: float = 0.05  # where β starts
    minibatch: int = 16
    critic: str = "shared"

    def __str__(self) -> str:
        text = f"batch {self.batch} by {self.minibatch}, lr {self.lr:g}, {self.cycles} cycles, β from {self.coef:g}"
        return text if self.critic == "shared" else f"{text}, {self.critic} critic"


SETTINGS = [
    Setting(batch=32, minibatch=8, lr=1e-4, target=6, cycles=100),
    Setting(batch=64, minibatch=32, lr=2e-4, target=5, cycles=50),
    Setting(batch=64, minibatch=32, lr=5e-4, target=8, cycles=50, critic="separate"),
    Setting(batch=128, minibatch=16, lr=5e-5, target=4, cycles=50, coef=0.01),
    Setting(batch=256, minibatch=16, lr=1e-5, target=1.5, cycles=50),
]


def run(setting: Setting, horizon: float | None, args: argparse.Namespace) -> list[tether.runs.Metrics]:
    """The metrics of every cycle."""
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            run=f"{folder}/run",
            seed=args.seed,
            device="cpu",
            model=ModelConfig(policy=args.model, critic=setting.critic),
            prompts=PromptsConfig(path=args.prompts, max_tokens=32),
            reward=[RewardSourceConfig(function=f"{EXAMPLE}/sentiment.py:sentiment", weight=3.0)],
            sampling=SamplingConfig(max_new_tokens=32),
            ppo=PPOSection(
                cycles=setting.cycles, batch=setting.batch, minibatch=setting.minibatch,
                kl=KLConfig(coef=setting.coef, target=setting.target, horizon=horizon),
            ),
            optim=OptimConfig(lr=setting.lr),
            log=LogConfig(tensorboard=False, rollouts_every=0),
            checkpoint=CheckpointConfig(every=1000),
            evaluate=HeldOutConfig(every=0),
        )  # fmt: skip
        return tether.ppo(config).metrics


def held(kls: list[float], target: float) -> float:
    """The share of them within 25 % of the target."""
    return fmean(abs(kl / target - 1) <= WITHIN for kl in kls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of stories260K")
    parser.add_argument("--settings", nargs="*", type=int, default=range(1, len(SETTINGS) + 1), help="which, from 1")
    parser.add_argument("--horizons", nargs="*", default=["none", "2000", "10000"], help="none: the default")
    parser.add_argument("--prompts", default=str(EXAMPLE / "prompts.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curves", action="store_true", help="KL and β of every cycle as well")
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    args.prompts = str(Path(args.prompts).resolve())
    print("| setting | target, nats | horizon | within 25 % | means of five | least | most | mean | score | last β |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for number in args.settings:
        setting = SETTINGS[number - 1]
        for name in args.horizons:
            metrics = run(setting, None if name == "none" else float(name), args)
            kl = [m["kl/ref_mean"] for m in metrics]
            counted = kl[setting.cycles // 10 :]
            means = [fmean(counted[i : i + 5]) for i in range(len(counted) - 4)]
            score = fmean(m["reward/score_mean"] for m in metrics[-5:])
            print(
                f"| {setting} | {setting.target:g} | {'null' if name == 'none' else name} "
                f"| {held(counted, setting.target):.0%} | {held(means, setting.target):.0%} | {min(counted):.2f} "
                f"| {max(counted):.2f} | {fmean(counted):.2f} | {score:.2f} | {metrics[-1]['kl/coef']:.3g} |",
                flush=True,
            )
            if args.curves:
                print("KL", " ".join(f"{x:.2f}" for x in kl), file=sys.stderr)
                print("β ", " ".join(f"{m['kl/coef']:.3g}" for m in metrics), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
