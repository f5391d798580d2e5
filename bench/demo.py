"""Does the demo keep its promise? Three towns, three stories, one table.

    python bench/demo.py [--seeds 0 1 2] [--to runs/bench-demo]

Asked of every seed: the hidden judge finds PPO better than its own start on at least 85 % of the held-out questions
(mean of 8 answers each, ties half), every axis higher than before, all of it within 6 minutes, and a final directory
that plain transformers loads and lets speak.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.demo import main as tell

WIN_RATE, MINUTES = 0.85, 6.0


def speaks(directory: Path) -> str:
    """What the model in `directory` answers, through transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Visitor: Where is the bakery?\nClerk:", return_tensors="pt")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=32)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--to", type=Path, default=Path("runs/bench-demo"))
    args = parser.parse_args()

    lines, passed = [], True
    for seed in args.seeds:
        to, began = args.to / f"seed-{seed}", time.monotonic()
        tell(to, seed=seed)
        minutes = (time.monotonic() - began) / 60
        result = json.loads((to / "result.json").read_text())
        before, after = result["before"], result["after"]
        good = (
            result["win_rate"] >= WIN_RATE and all(after[axis] > before[axis] for axis in before) and minutes <= MINUTES
        )
        passed &= good
        axes = "  ".join(f"{axis} {before[axis]:.2f} → {after[axis]:.2f}" for axis in before)
        lines.append(
            f"seed {seed}  {'pass' if good else 'FAIL'}  wins {result['win_rate']:.1%}  {axes}  {minutes:.1f} min"
        )
        lines.append(f"        in plain transformers: {speaks(to / 'ppo' / 'final')}")
    print("\n" + "\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
