"""What does a nat buy? Score over KL for five ways to spend it, from one model, with one reward, on the same openings.

stories260K and VADER's lexicon, as in examples/stories. Each way gets 18 × 128 = 2,304 scored answers and, where
it trains, 144 optimizer steps of 64 answers each, so that every answer is learned from four times:

    ppo        examples/stories/ppo.yaml, 18 cycles, but with the KL in the reward, a fixed β, no entropy bonus and half
               its learning rate
    group      the same without a critic: eight answers to an opening, compared with each other (RLOO)
    dpo        pairs out of a pool: 24 answers of the start model to each of the 96 openings, drawn and scored once per
               seed; each answer is compared with the next one to its opening
    bellman    `tether qlearning` on the same pool, answer by answer
    best-of-n  no training: the best of n of the same pool, for every n of BEST_OF

The first four have one optimum for one β, π* ∝ ref·exp(score/β), β in score units per nat. For ppo, group and bellman β
is the KL's coefficient. For dpo the label of a pair is T = σ(Δscore/DOUBT), soft, and log-odds of T are what
β_dpo·h becomes at the minimum (h: difference of the two log-ratios), so h = Δscore/(DOUBT·β_dpo) and β = DOUBT·β_dpo.
Every DOUBT has the same optimum; one for all β keeps labels off 0 and 1, where a small β as DOUBT would put them.

A policy is measured by `tether.evaluate`: fresh answers, 8 to each opening, their mean score and KL(policy‖start) in
nats per response, the mean of their log-ratios. That of best-of-n is `tether.math`'s, as in `tether evaluate`.
distinct-2 is bench/stories.py's, against the start model's answers.

Learning rates were picked by score - β·KL out of a few, on a seed that is not in the table. docs/evidence.md lists the
tries.

    python bench/frontier.py --model DIR [--seeds 0 1 2 3 4] [--plot docs/frontier.svg]
    python bench/frontier.py --model DIR --seeds 100 --routes dpo --betas .05 --rate 1e-3 --to DIR  tries a rate

Done runs are kept, so that two processes may do some --routes each and a third print the whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import tether
from chart import Line, draw
from paths import Row, add_options, figures, sweep
from stories import EXAMPLE, KEPT, best_of, distinct_2
from tether.config import (
    CheckpointConfig,
    DPOConfig,
    DPOSection,
    EvaluateConfig,
    HeldOutConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardSourceConfig,
    SamplingConfig,
    ScoredConfig,
)
from tether.runs import EvaluationDir, Run
from tether.runs.files import write_atomically

RATES = {"ppo": 7e-5, "group": 7e-5, "dpo": 1e-4, "bellman": 1e-4}
ROUTES = [*RATES, "best-of-n"]
BETAS = [0.05, 0.1, 0.2]  # score units per nat
BEST_OF = [1, 2, 4, 8, 16]
CYCLES, BATCH, STEP, EPOCHS = 18, 128, 64, 4  # of ppo; answers per cycle; answers per optimizer step
SAMPLES, NEW = 8, 64  # answers to an opening, of a policy that is measured; their longest, in tokens
DOUBT = 0.25  # score units per log-odds of a label
SENTIMENT = "sentiment.py:sentiment"
QUIET, NEVER = LogConfig(rollouts_every=0, tensorboard=False), CheckpointConfig(every=10**6)

Answer = dict[str, Any]  # completion, finish_reason, score


def measure(route: str, model: str, seed: int, to: Path, *, betas: list[float], cycles: int, rate: float | None) -> Row:
    """A route's points for one seed."""
    began = time.process_time()
    if route == "best-of-n":
        points = choose(draw_pool(model, seed, to, cycles=cycles), seed)
    else:
        assert rate is not None
        points = train(route, model, seed, to, betas=betas, cycles=cycles, rate=rate)
    return Row(points=points, minutes=(time.process_time() - began) / 60)


def draw_pool(model: str, seed: int, to: Path, *, cycles: int) -> dict[str, list[Answer]]:
    """As many scored answers of the start model as ppo has in all its cycles, by opening; drawn once, then kept."""
    prompts = EXAMPLE / "prompts.jsonl"
    each = cycles * BATCH // len(prompts.read_text().splitlines())
    file = to / f"pool-{Path(model).name}-{seed}-{each}.json"
    if not file.exists():
        found = tether.best_of_n(model, prompts, n=each, reward=SENTIMENT, max_new_tokens=NEW, seed=seed)
        write_atomically(file, json.dumps([asdict(opening) for opening in found]))
    names = ("completion", "finish_reason", "score")
    return {
        s["prompt"]: [
            dict(zip(names, answer, strict=True))
            for answer in zip(s["answers"], s["finish_reasons"], s["scores"], strict=True)
        ]
        for s in json.loads(file.read_text())
    }


# ---------------------------------------------------------------- best of n


def choose(pool: dict[str, list[Answer]], seed: int) -> list[Row]:
    scores = torch.tensor([[a["score"] for a in answers] for answers in pool.values()])
    texts = [[a["completion"] for a in answers] for answers in pool.values()]
    every = [text for row in texts for text in row]
    points = []
    for n in BEST_OF:
        if n <= scores.shape[1]:
            kl, score = best_of(scores, n)
            kept = winners(texts, scores, n)
            points.append(Row(setting=n, score=score, kl=kl, text=kept[0], variety=variety(kept, every, seed)))
    return points


def winners(texts: list[list[str]], scores: torch.Tensor, n: int) -> list[str]:
    """The best of each n answers in a row; what is left over at the end is in none."""
    best = scores[:, : scores.shape[1] // n * n].reshape(len(texts), -1, n).argmax(-1)
    return [row[i * n + k] for row, chosen in zip(texts, best.tolist(), strict=True) for i, k in enumerate(chosen)]


def variety(texts: list[str], start: list[str], seed: int) -> float | None:
    """distinct-2 over the start's; None of too few texts to compare."""
    return distinct_2(texts, seed) / distinct_2(start, seed) if min(len(texts), len(start)) >= KEPT else None


# ---------------------------------------------------------------- trained


def train(
    route: str, model: str, seed: int, to: Path, *, betas: list[float], cycles: int, rate: float
) -> list[Row]:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        if route in ("dpo", "bellman"):
            pool = draw_pool(model, seed, to, cycles=cycles)
            write_rows(data, compare(pool) if route == "dpo" else score(pool))
        runs: list[Run] = []
        for beta in betas:
            there = f"{folder}/{beta:g}"
            if route == "dpo":
                runs.append(tether.dpo(dpo(there, model, seed, data, beta, rate)))
            elif route == "bellman":
                runs.append(tether.qlearning(bellman(there, model, seed, data, beta, rate)))
            else:
                runs.append(tether.ppo(ppo(there, model, seed, beta, rate, cycles=cycles, group=route == "group")))
        found = evaluate(model, [str(run.final) for run in runs], seed, Path(folder) / "evaluation")
        return [
            Row(setting=beta, curve=curve(run)) | point for beta, run, point in zip(betas, runs, found, strict=True)
        ]


def ppo(run: str, model: str, seed: int, beta: float, rate: float, *, cycles: int, group: bool) -> PPOConfig:
    config = tether.load_config(EXAMPLE / "ppo.yaml")
    assert isinstance(config, PPOConfig)
    kl = KLConfig(coef=beta)
    section = replace(config.ppo, cycles=cycles, batch=BATCH, minibatch=STEP, epochs=EPOCHS, entropy_coef=0.0, kl=kl)
    if group:
        section = PPOSection(
            cycles=cycles, batch=BATCH, minibatch=STEP, epochs=EPOCHS, kl=kl, advantage="group", responses_per_prompt=8
        )
    return replace(
        config, run=run, seed=seed, model=replace(config.model, policy=model), ppo=section,
        optim=replace(config.optim, lr=rate, critic_lr=None if group else 2 * rate),
        evaluate=HeldOutConfig(every=0), checkpoint=NEVER, log=QUIET,
    )  # fmt: skip


def dpo(run: str, model: str, seed: int, data: Path, beta: float, rate: float) -> DPOConfig:
    section = DPOSection(beta=beta / DOUBT, epochs=EPOCHS // 2, batch=STEP // 2, test_fraction=0)
    return DPOConfig(
        run=run, seed=seed, model=ReferencedModelConfig(policy=model), data=PairsConfig(path=str(data)), dpo=section,
        optim=OptimConfig(lr=rate), checkpoint=NEVER, log=QUIET,
    )  # fmt: skip


def bellman(run: str, model: str, seed: int, data: Path, beta: float, rate: float) -> QLearningConfig:
    return QLearningConfig(
        run=run, seed=seed, model=ModelConfig(policy=model), data=ScoredConfig(path=str(data)),
        qlearning=QLearningSection(beta=beta, epochs=EPOCHS, batch=STEP), optim=OptimConfig(lr=rate),
        checkpoint=NEVER, log=QUIET,
    )  # fmt: skip


def compare(pool: dict[str, list[Answer]]) -> Iterable[Row]:
    """Pairs: each answer with the next to its opening, the last with the first."""
    for prompt, answers in pool.items():
        for a, b in zip(answers, [*answers[1:], answers[0]], strict=True):
            if a["completion"] != b["completion"]:
                yield {
                    "prompt": prompt, "chosen": a["completion"], "rejected": b["completion"],
                    "probability": 1 / (1 + math.exp((b["score"] - a["score"]) / DOUBT)),
                    "chosen_finish_reason": a["finish_reason"], "rejected_finish_reason": b["finish_reason"],
                }  # fmt: skip


def score(pool: dict[str, list[Answer]]) -> Iterable[Row]:
    for prompt, answers in pool.items():
        for answer in answers:
            yield {"prompt": prompt} | answer


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(run: Run) -> list[tuple[float, float]]:
    """(KL, score) of each cycle, where a run samples."""
    return [(m["kl/ref_mean"], m["reward/score_mean"]) for m in run.metrics if "kl/ref_mean" in m]


def evaluate(model: str, policies: list[str], seed: int, to: Path) -> list[Row]:
    """Each policy on fresh answers."""
    found = tether.evaluate(
        EvaluateConfig(
            models=policies, baseline=model, prompts=PromptsConfig(str(EXAMPLE / "prompts.jsonl")), run=str(to),
            reward=[RewardSourceConfig(function=SENTIMENT)], samples=SAMPLES, best_of=[], seed=1000 + seed,
            sampling=SamplingConfig(max_new_tokens=NEW),
        )
    )  # fmt: skip
    texts = [EvaluationDir(to).answers(i).column("completion").to_pylist() for i in range(len(found.results))]
    points = []
    for result, answers in list(zip(found.results, texts, strict=True))[1:]:
        assert result.kl is not None
        points.append(
            Row(score=result.score.mean, kl=result.kl.mean, length=result.length, truncated=result.truncated,
                variety=variety(answers, texts[0], seed), text=answers[0])
        )  # fmt: skip
    return points


# ---------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of stories260K")
    add_options(parser, seeds=5, to="runs/bench-frontier")
    parser.set_defaults(paths=["default"])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=ROUTES)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--cycles", type=int, default=CYCLES, help="of 128 answers, by threes: the pool has as many")
    parser.add_argument("--rate", type=float, help="another learning rate, to try")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.cycles % 3:
        parser.error(f"--cycles {args.cycles}: {args.cycles} × {BATCH} answers are no whole number for each opening")
    args.to, plot = args.to.resolve(), args.plot.resolve() if args.plot else None
    model = str(Path(args.model).resolve())
    os.chdir(EXAMPLE)

    def how(route: str) -> dict[str, Any]:
        return {"betas": args.betas, "cycles": args.cycles, "rate": args.rate or RATES.get(route)}

    if result := os.environ.get("RESULT"):
        (route,), (seed,) = args.routes, args.seeds
        Path(result).write_text(json.dumps(measure(route, model, seed, args.to, **how(route))))
        return
    one = [__file__, "--model", model, "--to", str(args.to), "--cycles", str(args.cycles)]
    one += ["--betas", *map(str, args.betas), *(["--rate", str(args.rate)] if args.rate else [])]
    rows: dict[str, list[Row]] = {}
    for seed in args.seeds:  # seed by seed, so that what is done compares all routes
        only = argparse.Namespace(**vars(args) | {"seeds": [seed]})
        for route in args.routes:
            command = [*one, "--routes", route]
            rows[route] = sweep(
                only,
                lambda s, path, c=command: figures([*c, "--seeds", str(s)], path),
                route=route,
                model=Path(model).name,
                **how(route),
            )
    show(rows)
    if plot:
        draw(plot, lines(rows), x="KL to the start model, nats per response", y="sentiment of one answer")


def show(rows: dict[str, list[Row]]) -> None:
    """Mean over seeds, with the lowest and the highest: of five seeds they hold the median in 15 of 16 cases."""
    print("| | β, or n | KL, nats | score | score − β·KL | distinct-2 against the start |")
    print("|---|---|---|---|---|---|")
    for route, runs in rows.items():
        for points in settings(runs):
            setting = points[0]["setting"]
            objective = [p["score"] - setting * p["kl"] if route in RATES else None for p in points]
            columns = [
                [p["kl"] for p in points],
                [p["score"] for p in points],
                objective,
                [p["variety"] for p in points],
            ]
            cells = [spread(column, form) for column, form in zip(columns, (".2f", ".3f", ".3f", ".0%"), strict=True)]
            print(f"| {route} | {setting:g} | {' | '.join(cells)} |")
    for route, runs in rows.items():
        print(f"{route:10}{len(runs)} seeds, {spread([row['minutes'] for row in runs], '.1f')} minutes of a core each")
    for route, runs in rows.items():
        for point in runs[0]["points"]:
            print(f"\n{route}, {point['setting']:g}: {' '.join(point['text'].split())}")


def settings(runs: list[Row]) -> list[tuple[Row, ...]]:
    """The points of all seeds, setting by setting."""
    return list(zip(*(row["points"] for row in runs), strict=True))


def spread(numbers: list[float | None], form: str) -> str:
    known = [x for x in numbers if x is not None]
    if not known:
        return "–"
    return f"{sum(known) / len(known):{form}} [{min(known):{form}}, {max(known):{form}}]"


def lines(rows: dict[str, list[Row]]) -> list[Line]:
    """For each route a line through the means, and at each of them the lowest and highest of both."""
    found = []
    for route, runs in rows.items():
        means, bars = [], []
        for points in settings(runs):
            kls, scores = sorted(p["kl"] for p in points), sorted(p["score"] for p in points)
            kl, mean = sum(kls) / len(kls), sum(scores) / len(scores)
            means.append((kl, mean))
            bars += [[(kls[0], mean), (kls[-1], mean)], [(kl, scores[0]), (kl, scores[-1])]]
        found += [Line(route, means), Line(route, means, dots=True), *(Line(route, bar) for bar in bars)]
    return found


if __name__ == "__main__":
    main()
