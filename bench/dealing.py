"""How evenly rows of ragged lengths are dealt out to ranks, and what stragglers cost: a simulation, nothing is trained.

    python bench/dealing.py     a minute on one core

Lengths are log-normal (median 200 tokens, σ .7, at most 4,000), 64 rows a rank, 8,192 padded tokens at once; means over
eight draws. A rank's time is its padded tokens, each microbatch's times a log-normal factor (the noise), and each
rank's times another (a slower processor, one draw a rank). Under `replicate` ranks wait for each other once a pass: the
pass takes as long as the slowest rank. Under `full` they wait for each other in every layer, so each turn takes as long
as its slowest microbatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tether.distributed.ranks import dealt
from tether.types import microbatches

TOKENS, ROWS, DRAWS = 8192, 64, 8
NOISE = {"no noise": (0.0, 0.0), "5 % a microbatch": (0.05, 0.0), "and 5 % a rank": (0.05, 0.05)}


def padded(group: Tensor, lengths: Tensor) -> int:
    return len(group) * int(lengths[group].max())


def simulate(size: int, generator: torch.Generator) -> tuple[float, dict[str, tuple[float, float]]]:
    """(padded tokens over those of one process; by noise, slowest rank and sum of the turns, over the mean)."""
    lengths = torch.randn(ROWS * size, generator=generator).mul(0.7).exp().mul(200).long().clamp(1, 4000)
    ranks = dealt(lengths, TOKENS, size)
    spare = min(ranks[0], key=len)
    tokens = torch.tensor(
        [[padded(g, lengths) for g in [*groups, *[spare] * (len(ranks[0]) - len(groups))]] for groups in ranks]
    ).double()  # [ranks, turns]
    alone = sum(padded(g, lengths) for g in microbatches(lengths, TOKENS))
    found = {}
    for name, (each, rank) in NOISE.items():
        noise = (each * torch.randn(tokens.shape, generator=generator)).exp()
        seconds = tokens * noise * (rank * torch.randn(size, 1, generator=generator)).exp()
        mean = seconds.sum(1).mean()
        found[name] = float(seconds.sum(1).max() / mean), float(seconds.max(0).values.sum() / mean)
    return float(tokens.sum() / alone), found


def main() -> None:
    columns = [f"{name}: {shard}" for name in NOISE for shard in ("replicate", "full")]
    print(f"| ranks | padded tokens | {' | '.join(columns)} |")
    print("|--:" * (2 + len(columns)) + "|")
    for size in (2, 4, 8, 16, 32, 64):
        draws = [simulate(size, torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
        cells = [f"{sum(excess for excess, _ in draws) / DRAWS - 1:+.1%}"]
        for name in NOISE:
            cells += [f"{sum(found[name][i] for _, found in draws) / DRAWS - 1:.1%}" for i in range(2)]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
