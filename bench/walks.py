"""trlX's benchmark, the random walks of examples/random_walks, in trlX's own budget: which routes learn it?

    python bench/walks.py [--routes optimum ppo group bellman ilql] [--betas 0.05 0.1] [--seeds 0 1 …] [--paths …]

Every seed imitates the 1000 walks anew (sft.yaml), then each route learns from there as its config says, but for β.
Nothing is estimated: walks are few enough to follow every prefix that a policy takes with a probability above 1e-5, so
the score that sampling at temperature 1 expects, mean over the 20 starts, is exact to four digits, and so is the KL.
`greedy` scores the likeliest walk from each start. `optimum` trains nothing: the best score that there is at this β
with the imitated model as the reference, and its KL; how many walks leave the graph is the imitated model's own. With
the uniform walk as the reference it is 0.9954 at 1.819 nats for β = 0.05, and 0.9749 at 1.541 for 0.1. ilql has no β:
it is trained once, and sampled from at the strength 1/β. Half a minute for a seed, a route and a β on one core,
Q-learning one and a half.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread would only wait for the first
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import tether
from paths import Row, add_options, figures, ranged, sweep
from tether.config.reading import parse_args
from tether.models.ilql import load_steering
from tether.models.loading import load_causal_lm

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "random_walks"
ROUTES = ("optimum", "ppo", "group", "bellman", "ilql")
COMMANDS = {
    "ppo": "ppo",
    "group": "ppo",
    "bellman": "qlearning",
    "ilql": "qlearning",
}  # route, named as its config -> command
BETA = {"ppo": "ppo.kl.coef", "group": "ppo.kl.coef", "bellman": "qlearning.beta"}
BETAS = (0.05, 0.1)  # that of the configs; and one at which the score still has to be bought
Logits = Callable[[Tensor], Tensor]
SEEN = 1e-5  # a walk less likely than this is not followed


def next_logprobs(model: Logits, walks: Tensor) -> Tensor:
    """[n, nodes] float64: log-probability of every next node after each of these walks [n, length]."""
    with torch.no_grad():
        return torch.cat([model(part)[:, -1].double().log_softmax(-1) for part in walks.split(4096)])


def follow(model: Logits, seen: float = SEEN) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every walk along edges that is still on its way, by length: (walks [n, length], their probabilities [n],
    log-probabilities of the next node [n, nodes], whether there is an edge to it [n, nodes])."""
    import walks

    edges = torch.from_numpy(walks.world()[0])
    at, p = torch.arange(1, walks.NODES)[:, None], torch.ones(walks.NODES - 1, dtype=torch.float64)
    while len(at) and at.shape[1] < walks.LONGEST:
        logprobs, edge = next_logprobs(model, at), edges[at[:, -1]]
        yield at, p, logprobs, edge
        onward = p[:, None] * logprobs.exp() * edge
        onward[:, walks.GOAL] = 0
        row, node = (onward > seen).nonzero(as_tuple=True)
        at, p = torch.cat([at[row], node[:, None]], 1), onward[row, node]


def arrivals(model: Logits, seen: float = SEEN) -> Iterator[tuple[int, float, float]]:
    """(start, score, probability) of every walk that arrives."""
    import walks

    for at, p, logprobs, edge in follow(model, seen):
        arrives = p * logprobs[:, walks.GOAL].exp() * edge[:, walks.GOAL]
        for row in arrives.nonzero().flatten().tolist():
            yield int(at[row, 0]), walks.score_walk([*at[row].tolist(), walks.GOAL]), float(arrives[row])


def measure(model: Logits, reference: Logits) -> Row:
    """Score and greedy score, mean over starts; KL to the reference, nats a walk; share of walks that leave the
    graph."""
    import walks

    starts = walks.NODES - 1
    kl = left = 0.0
    for at, p, logprobs, edge in follow(model):
        chance = logprobs.exp()
        log_ratio = torch.where(chance > 0, logprobs - next_logprobs(reference, at), 0.0)  # ilql never takes some
        kl += float((p[:, None] * chance * log_ratio).sum()) / starts
        left += float((p[:, None] * chance * ~edge).sum()) / starts
    greedy = torch.arange(1, walks.NODES)[:, None]
    while greedy.shape[1] < walks.LONGEST:
        greedy = torch.cat([greedy, next_logprobs(model, greedy).argmax(-1, keepdim=True)], 1)
    score = sum(score * p for _, score, p in arrivals(model)) / starts
    return Row(score=score, kl=kl, left=left, greedy=sum(map(walks.score_walk, greedy.tolist())) / starts)


def optimum(reference: Logits, beta: float) -> tuple[float, float]:
    """(score, KL in nats a walk) of the best policy at β, π* ∝ ref·e^(score/β), mean over starts. Walks rarer than 1e-4
    move neither by 1e-6."""
    found: dict[int, list[tuple[float, float]]] = {}
    for start, score, p in arrivals(reference, 1e-4):
        found.setdefault(start, []).append((score, p))
    best = [_optimum(walks, beta) for walks in found.values()]
    return sum(score for score, _ in best) / len(best), sum(kl for _, kl in best) / len(best)


def _optimum(found: Sequence[tuple[float, float]], beta: float) -> tuple[float, float]:
    """Of one start; found: (score, probability) of the walks that arrive, others score 0."""
    total = 1 - sum(p for _, p in found) + sum(p * math.exp(score / beta) for score, p in found)
    best = sum(p * math.exp(score / beta) * score for score, p in found) / total
    return best, best / beta - math.log(total)


def load(path: Path, strength: float | None = None) -> Logits:
    """The model's logits [n, length, nodes] of walks [n, length], steered by its heads where a strength is given."""
    cpu = torch.device("cpu")
    lm = load_causal_lm(str(path), dtype=torch.float32, device=cpu).eval()
    if strength is None:
        return lambda walks: lm(walks).logits
    width, vocabulary = lm.config.hidden_size, lm.config.vocab_size
    steer = load_steering(str(path), width=width, vocabulary=vocabulary, device=cpu, strength=strength)
    assert steer is not None

    def steered(walks: Tensor) -> Tensor:
        found = lm(walks, output_hidden_states=True)
        return steer(found.logits[:, -1], found.hidden_states[-1][:, -1])[:, None]

    return steered


def train(command: str, file: str, run: Path, seed: int, **flags: object) -> tuple[Path, float]:
    """(the trained model, seconds)"""
    words = [file, "--run", str(run), "--seed", str(seed), "--log.rollouts_every", "0"]
    words += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    began = time.monotonic()
    done = getattr(tether, command)(parse_args(command, words)[0])
    return done.final, time.monotonic() - began


def measured(route: str, beta: float, seed: int, folder: Path) -> Row:
    """One seed of one route."""
    start, seconds = train("sft", "sft.yaml", folder / "sft", seed)  # or what is there already
    reference = load(start)
    if route == "optimum":
        best, kl = optimum(reference, beta)
        return measure(reference, reference) | {"score": best, "kl": kl, "seconds": seconds}
    if route == "ilql":
        final, seconds = train("qlearning", "ilql.yaml", folder / "ilql", seed, **{"model.policy": start})
        return measure(load(final, strength=1 / beta), reference) | {"seconds": seconds}
    run = folder / f"{route}-{beta:g}"
    flags = {"model.policy": start, BETA[route]: beta}
    final, seconds = train(COMMANDS[route], f"{route}.yaml", run, seed, **flags)
    return measure(load(final), reference) | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seeds=10, to="runs/bench-walks")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS), help="reward units per nat")
    args = parser.parse_args()
    args.to = args.to.resolve()
    os.chdir(EXAMPLE)
    sys.path.insert(0, str(EXAMPLE))
    import walks

    if result := os.environ.get("RESULT"):
        folder = args.to / f"{args.paths[0]}-{args.seeds[0]}"
        Path(result).write_text(json.dumps(measured(args.routes[0], args.betas[0], args.seeds[0], folder)))
        return
    walks.main()
    table = [
        "| route | β | score | at least 0.95 | KL, nats | greedy | leave the graph | s |",
        "|---|--:|---|--:|---|---|---|---|",
    ]
    for route, beta in itertools.product(args.routes, args.betas):
        one = [__file__, "--routes", route, "--betas", str(beta), "--to", str(args.to)]
        run = lambda seed, path, one=one: figures([*one, "--seeds", str(seed), "--paths", path], path)  # noqa: E731
        rows = sweep(args, run, route=route, beta=beta)
        scores = [row["score"] for row in rows]
        kl, greedy, left, seconds = (
            ranged((row[key] for row in rows), form)
            for key, form in (("kl", ".3f"), ("greedy", ".2f"), ("left", ".1%"), ("seconds", ".0f"))
        )
        table.append(
            f"| {route} | {beta:g} | {ranged(scores, '.3f')}, mean {sum(scores) / len(scores):.3f} "
            f"| {sum(s >= 0.95 for s in scores)} of {len(scores)} | {kl} | {greedy} | {left} | {seconds} |"
        )
    print("", *table, sep="\n")


if __name__ == "__main__":
    main()
