"""Random walks, the benchmark of trlX: reach node 0 of a small directed graph in as few steps as possible.

    python walks.py                  writes tokenizer/, prompts.jsonl, walks.jsonl and unseen.jsonl beside this file

21 nodes, an edge where a uniform number exceeds 0.9, no node without one; 1000 walks of at most 10 nodes along uniform
edges, from any node but the goal. A walk scores (10 - nodes) / (10 - nodes of the shortest walk from its start): 1 is
optimal, 0 is a walk that leaves the graph or does not arrive. The figures depend on the seed of the graph: 1000 here.

    sft.yaml        imitates the walks: where the others begin, and their reference
    ppo.yaml        20 cycles of 128 walks, 4 epochs: trlX's budget for PPO
    group.yaml      the same with a group baseline in place of a critic
    bellman.yaml    from the 1000 walks alone, nothing sampled, 1000 steps of 100: trlX's budget for ILQL

unseen.jsonl says what the log leaves open. No logged walk leaves the graph, so nothing that is learned from them alone
says what leaving costs, and some of the policy's mass goes there. Each of its rows is a logged walk that breaks off and
steps where nobody stepped from that node in 1000 walks, with score 0: the pessimism of offline methods, as data.

`python bench/walks.py` runs all of them over seeds; what to expect is in docs/evidence.md.
Source: trlX, examples/randomwalks, and Chen et al. 2021 (arXiv:2106.01345), figure 3.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
NODES, GOAL, LONGEST, WALKS, SEED = 21, 0, 10, 1000, 1000  # longest: nodes in a walk, the start included
NAMES = "abcdefghijklmnopqrstu"  # a is the goal, and what ends an answer


@cache
def world(seed: int = SEED) -> tuple[np.ndarray, list[list[int]]]:
    """(edges[from, to], the walks as lists of nodes): drawn in trlX's order, so that they are its own."""
    draw = np.random.RandomState(seed)
    while True:
        edges = draw.rand(NODES, NODES) > 0.9
        np.fill_diagonal(edges, False)
        if edges.sum(1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    walks = []
    for _ in range(WALKS):
        node = GOAL
        while node == GOAL:
            node = draw.randint(NODES)
        walk = [node]
        while len(walk) < LONGEST and walk[-1] != GOAL:
            walk.append(int(draw.choice(np.nonzero(edges[walk[-1]])[0])))
        walks.append(walk)
    return edges, walks


@cache
def shortest(seed: int = SEED) -> list[int]:
    """Nodes of the shortest walk from each node to the goal, both counted; LONGEST where there is none."""
    edges, _ = world(seed)
    found = [LONGEST] * NODES
    found[GOAL] = 1
    for _ in range(LONGEST):
        for node in range(NODES):
            found[node] = min([found[node], *(found[n] + 1 for n in np.nonzero(edges[node])[0])])
    return found


def score_walk(walk: list[int], seed: int = SEED) -> float:
    """How close a walk is to the shortest one from its start, 0 to 1."""
    edges, _ = world(seed)
    arrived = walk.index(GOAL) + 1 if GOAL in walk else None
    if arrived is None or not all(edges[a, b] for a, b in pairwise(walk[:arrived])):
        return 0.0
    best = shortest(seed)[walk[0]]
    return (LONGEST - arrived) / (LONGEST - best) if best < LONGEST else 0.0


def unseen(walks: list[list[int]]) -> list[list[int]]:
    """One for each walk: it breaks off after some node, and goes where no walk went from there."""
    seen = {edge for walk in walks for edge in pairwise(walk)}
    draw = np.random.default_rng(0)
    broken = []
    for walk in walks:
        start = walk[: draw.integers(1, len(walk))]  # never the goal, which ends a walk
        broken.append([*start, int(draw.choice([n for n in range(NODES) if (start[-1], n) not in seen]))])
    return broken


def optimality(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
    """The reward function: a token's id is its node's number."""
    return [score_walk([NAMES.index(p), *ids]) for p, ids in zip(prompts, completion_ids, strict=True)]


def row(walk: list[int], score: float) -> dict[str, str | float]:
    """A walk as prompt and completion: its start, and the rest."""
    rest = " ".join(NAMES[node] for node in walk[1:])
    reason = "stop" if walk[-1] == GOAL else "length"
    return {"prompt": NAMES[walk[0]], "completion": rest, "finish_reason": reason, "score": score}


def main() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token=NAMES[GOAL]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=NAMES[GOAL]).save_pretrained(HERE / "tokenizer")
    _, walks = world()
    starts = sorted({walk[0] for walk in walks})
    files = {
        "prompts": [{"prompt": NAMES[node]} for node in starts],
        "walks": [row(walk, score_walk(walk)) for walk in walks],
        "unseen": [row(walk, 0.0) for walk in unseen(walks)],
    }
    for name, rows in files.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(
        f"{len(starts)} starts, {len(walks)} walks that score {sum(map(score_walk, walks)) / len(walks):.4f} on average"
    )


if __name__ == "__main__":
    main()
