"""Does the demo keep its promise on every machine? Eight towns, two CPU paths, one table with ranges.

    python bench/demo.py [--seeds 0 1 2 3 4 5 6 7] [--paths default avx2] [--to runs/bench-demo]

Every run's figures are a line of results.jsonl. A run that has its line is not repeated, so the table can be made in
pieces; what a CPU path is says `bench/paths.py`.

Asked: the reward model is right on ≥ 70 % of held-out pairs in 15 runs of 16 and differs by ≤ 6 points between runs;
the hidden judge prefers PPO to its own start on ≥ 85 % of the held-out questions in 14 of 16 (mean of 8 answers each,
ties half). In every run each axis is higher than before, at most 10 % of the answers say a sentence twice, and all
of it takes ≤ 6 minutes (on two cores that do nothing else).
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paths import Row, add_options, figures, ranged, sweep
from tether.demo.annotators import PEOPLE
from tether.demo.judge import Judge
from tether.demo.show import AXES
from tether.demo.world import World

ACCURACY, SPREAD, WIN_RATE, REPEATS, MINUTES = 0.70, 0.06, 0.85, 0.10, 6.0
ACCURATE, WON = 15 / 16, 14 / 16  # share of the runs that must reach ACCURACY and WIN_RATE

TELL = """
import json, os, sys, torch
from pathlib import Path
from tether.demo import main
main(Path(sys.argv[1]), seed=int(sys.argv[2]))
Path(os.environ["RESULT"]).write_text(json.dumps({"cpu": torch.backends.cpu.get_cpu_capability()}))
"""


def run(to: Path, seed: int, path: str) -> Row:
    """The figures of one demo, told from its beginning."""
    shutil.rmtree(to, ignore_errors=True)  # a part of an earlier try would make the minutes wrong
    began = time.monotonic()
    cpu = figures(["-c", TELL, str(to), str(seed)], path)
    minutes = (time.monotonic() - began) / 60
    found = {"minutes": minutes, "says": speaks(to / "ppo" / "final"), "habits_alone": habits_alone(to, seed)}
    return cpu | found | json.loads((to / "result.json").read_text())


def habits_alone(to: Path, seed: int) -> float:
    """How often one is right who sees every habit of an answer, but knows nothing of the town.

    A logistic regression on the difference in habits, apart for every kind of question, fitted to the annotators' true
    probabilities on four fifths of the prompts. A reward model at this figure has not learned what is true.
    """
    world = World(seed)
    judge, asks = Judge(world), {ask.prompt: ask for topic in world.topics() for ask in topic}
    pairs = [json.loads(line) for line in (to / "pairs.jsonl").read_text().splitlines()]
    verdicts = [[judge(asks[p["prompt"]], p[side]) for side in ("chosen", "rejected")] for p in pairs]
    sorts = sorted({sort for both in verdicts for v in both for sort in v.habits})
    kinds = ["fact", "unknown", "errand", "danger"]
    x = torch.zeros(len(pairs), len(kinds), 2 * len(sorts), dtype=torch.float64)
    for i, (pair, (first, second)) in enumerate(zip(pairs, verdicts, strict=True)):
        for j, sort in enumerate(sorts):
            a, b = first.habits[sort], second.habits[sort]
            x[i, kinds.index(asks[pair["prompt"]].kind), 2 * j : 2 * j + 2] = torch.tensor([a - b, (a > 0) - (b > 0)])
    x = x.flatten(1)
    likes_first = torch.tensor(
        [sum(person.prefers_first(*both) for person in PEOPLE) / len(PEOPLE) for both in verdicts], dtype=torch.float64
    )
    held_out = torch.tensor([list(asks).index(pair["prompt"]) % 5 == 0 for pair in pairs])
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(20):  # Newton's method, with a little ridge
        p = torch.sigmoid(x[~held_out] @ weights)
        slope = x[~held_out].T @ (p - likes_first[~held_out]) + 0.1 * weights
        curve = (x[~held_out] * (p * (1 - p))[:, None]).T @ x[~held_out] + 0.1 * torch.eye(len(weights)).double()
        weights -= torch.linalg.solve(curve, slope)
    guess, truth = x[held_out] @ weights, likes_first[held_out]
    right = torch.where(guess.abs() < 1e-6, 0.5, torch.where(guess > 0, truth, 1 - truth))
    return float(right.mean())


def speaks(directory: Path) -> str:
    """What the model in `directory` answers, through transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Visitor: Where is the bakery?\nClerk:", return_tensors="pt")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=32)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def good(row: Row) -> bool:
    """What is asked of every run."""
    up = all(row["after"][axis] > row["before"][axis] for axis in AXES)
    return bool(up and row["repeats"][1] <= REPEATS and row["minutes"] <= MINUTES)


def show(rows: list[Row]) -> bool:
    """Print the table and the ranges; returns whether what is asked was found."""
    print(
        f"\n{'seed':>4}  {'path':8}{'reward model':>14}{'habits':>8}{'ceiling':>9}{'judge prefers':>15}"
        + "".join(f"{axis:>15}" for axis in AXES)
        + f"{'courtesies':>15}{'repeats':>13}{'KL':>6}{'minutes':>9}"
    )
    for row in rows:
        changes = [(row["before"][axis], row["after"][axis]) for axis in AXES] + [row["courtesies"]]
        print(
            f"{row['seed']:4}  {row['path']:8}"
            f"{row['reward_model']:14.1%}{row['habits_alone']:8.1%}{row['noise_ceiling']:9.1%}{row['win_rate']:15.1%}"
            + "".join(f"{f'{was:.2f} → {now:.2f}':>15}" for was, now in changes)
            + f"{'{:.0%} → {:.0%}'.format(*row['repeats']):>13}{row['kl']:6.2f}{row['minutes']:9.1f}"
            + ("" if good(row) else "  FAIL")
        )
    for row in rows:
        print(f"{row['seed']:4}  {row['path']:8}in plain transformers: {row['says']}")
    accuracy, habits, ceilings, wins, spent, minutes = (
        [row[name] for row in rows]
        for name in ("reward_model", "habits_alone", "noise_ceiling", "win_rate", "kl", "minutes")
    )
    was, now = ([row[when]["score"] for row in rows] for when in ("before", "after"))
    results = {
        f"reward model right on {ranged(accuracy)} of held-out pairs (by habits alone {ranged(habits)}, noise ceiling "
        f"{ranged(ceilings)}): "
        f"≥ {ACCURACY:.0%} in {mean(a >= ACCURACY for a in accuracy):.0%} of the runs": (
            mean(a >= ACCURACY for a in accuracy) >= ACCURATE and max(accuracy) - min(accuracy) <= SPREAD
        ),
        f"judge prefers the result on {ranged(wins)}: ≥ {WIN_RATE:.0%} in {mean(w >= WIN_RATE for w in wins):.0%}": (
            mean(w >= WIN_RATE for w in wins) >= WON
        ),
        f"score {ranged(was, '.2f')} → {ranged(now, '.2f')}, KL {ranged(spent, '.1f')} nats, "
        f"{ranged(minutes, '.1f')} minutes; in every run each axis up, few repeats, in time": all(map(good, rows)),
    }
    print(f"\n{len(rows)} runs:")
    for text, passed in results.items():
        print(f"    {'pass' if passed else 'FAIL'}  {text}")
    return all(results.values())


def mean(numbers: Any) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seeds=8, to="runs/bench-demo")
    args = parser.parse_args()
    rows = sweep(args, lambda seed, path: run(args.to / f"seed-{seed}-{path}", seed, path))
    return 0 if show(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
