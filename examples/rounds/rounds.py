"""DPO in rounds: the model answers, its answers are scored, it learns from the pairs, and answers again.

    python examples/rounds/rounds.py MODEL [--to runs/rounds] [--rounds 3]      # minutes on two cores

Each round
1. `tether.generate`: the model of the round before answers every prompt of examples/stories, `--samples` answers each.
2. VADER's lexicon (Hutto & Gilbert 2014) scores them. Two answers make a pair, with the probability that somebody who
   chooses by score would prefer the first, P = σ(Δscore): a soft label, which keeps how much better it is.
   People take the lexicon's place with `tether label --sample MODEL --prompts FILE`, the studio, and the store as
   `data: {path: preferences.db}`.
3. `tether.dpo` goes on from that model. The reference stays the model of the start, and so does the optimum that the
   rounds approach; what changes is where the pairs come from.

Needs `pip install vaderSentiment`.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import tether
from tether.config import DPOConfig, DPOSection, LogConfig, OptimConfig, PairsConfig, ReferencedModelConfig
from tether.train.evaluate import Generation

PROMPTS = Path(__file__).resolve().parent.parent / "stories" / "prompts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a small causal language model, such as stories260K")
    parser.add_argument("--to", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt (%(default)s)")
    parser.add_argument("--prompts", type=int, help="only the first so many")
    parser.add_argument("--beta", type=float, default=0.1, help="reward units per nat, as in PPO (%(default)s)")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()][: args.prompts]

    model = args.model
    for number in range(1, args.rounds + 1):
        answers = tether.generate(model, prompts, samples=args.samples, max_new_tokens=64, seed=number)
        scores = [score(answer.completion) for answer in answers]
        print(f"round {number}: {model} scores {sum(scores) / len(scores):.3f}", flush=True)
        pairs = args.to / f"pairs-{number}.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in compared(answers, scores)))
        run = tether.dpo(DPOConfig(
            run=str(args.to / f"round-{number}"),
            seed=number,
            model=ReferencedModelConfig(policy=model, reference=args.model),
            data=PairsConfig(path=str(pairs)),
            dpo=DPOSection(beta=args.beta, batch=32, epochs=2, test_fraction=0),  # the next round measures it
            optim=OptimConfig(lr=3e-4),
            log=LogConfig(tensorboard=False),
        ))  # fmt: skip
        model = str(run.final)
    answers = tether.generate(model, prompts, samples=args.samples, max_new_tokens=64, seed=args.rounds + 1)
    print(f"in the end: {model} scores {sum(score(a.completion) for a in answers) / len(answers):.3f}")


def compared(answers: list[Generation], scores: list[float]) -> list[dict[str, object]]:
    """Each answer with the next one to the same prompt."""
    rows = []
    for (a, mine), (b, other) in pairwise(zip(answers, scores, strict=True)):
        if a.prompt == b.prompt and a.completion != b.completion:
            rows.append({
                "prompt": a.prompt, "chosen": a.completion, "rejected": b.completion,
                "probability": 1 / (1 + math.exp(other - mine)),
                "chosen_finish_reason": a.finish_reason, "rejected_finish_reason": b.finish_reason,
            })  # fmt: skip
    return rows


_analyzer = SentimentIntensityAnalyzer()


def score(text: str) -> float:
    """How happy a story sounds, from -1 to 1."""
    return float(_analyzer.polarity_scores(text)["compound"])


if __name__ == "__main__":
    main()
