"""Best of n: draw n responses, keep the one with the highest score. What it scores, and its distance from the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def best_of_n_score(
    scores: Float[Tensor, "P N"], *, n: int, values: Float[Tensor, "P N"] | None = None
) -> Float[Tensor, " P"]:
    """E[max of n] for each prompt, from N ≥ n samples of it: unbiased, and over every choice of n samples.

    values: another reading of the samples, gold, whose mean over the ones that `scores` would choose is wanted; among
    samples that score alike the later one is chosen.

        Σ_i s_(i) · C(i-1, n-1) / C(N, n)        s_(1) ≤ … ≤ s_(N); the weight is P(s_(i) is the best of n of the N)

    Source: Nakano et al. 2021, appendix I (arXiv:2112.09332).
    """
    samples = scores.shape[1]
    weights = [math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)]
    order = scores.double().sort(dim=1, stable=True)
    best = order.values if values is None else values.double().gather(1, order.indices)
    return best @ torch.tensor(weights, dtype=torch.float64, device=scores.device)


def best_of_n_probabilities(probabilities: Float[Tensor, " L"], *, n: int) -> Float[Tensor, " L"]:
    """How often best of n gives each of L score levels, lowest first: F(l)^n - F(l-1)^n, F the levels' cumulative sum.

    probabilities: of each level under the model, which sum to 1.
    """
    cumulative = probabilities.cumsum(0) ** n
    return cumulative.diff(prepend=cumulative.new_zeros(1))


def best_of_n_kl(probabilities: Float[Tensor, " L"], *, n: int) -> Float[Tensor, ""]:
    """KL(best of n ‖ model) in nats, exact: with ties broken at random it is that of the score levels.

    Within a level best of n keeps the model's proportions, so responses of one level add nothing of their own.
    probabilities: as in `best_of_n_probabilities`.
    """
    best = best_of_n_probabilities(probabilities, n=n)
    return torch.where(best > 0, best * (best / probabilities).log(), 0.0).sum()


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: KL(best of n ‖ model) where no two responses score alike, and above it where some do.

    Source: Beirami et al. 2024 (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_kl_estimate(scores: Float[Tensor, "P N"], *, n: int) -> Float[Tensor, " P"]:
    """KL(best of n ‖ model) in nats for each prompt, from N samples of it: the exact KL of their empirical levels.

    A score that one sample alone has counts as untied: its 1/N is not one level but spread, density n·u^(n-1) at the
    quantile u. So the estimate is the bound where all scores differ, at any N; the empirical levels alone would give
    .131 instead of .193 at n = N = 2. Where levels are few it is too low at small N (E2: .29 for .36 at n = 4, N = 8).
    """
    return torch.stack([_kl_estimate(row.double(), n) for row in scores])


def _kl_estimate(scores: Float[Tensor, " N"], n: int) -> Float[Tensor, ""]:
    _, counts = scores.unique(return_counts=True)
    up_to = counts.cumsum(0)
    high, low = up_to.double() / len(scores), (up_to - counts).double() / len(scores)  # low is 0 exactly at the first
    best = high**n - low**n
    tied = best * (best * len(scores) / counts).clamp_min(1e-300).log()  # far below the best a share may underflow to 0
    return torch.where(counts > 1, tied, _spread(high, n) - _spread(low, n)).sum()


def _spread(u: Float[Tensor, " L"], n: int) -> Float[Tensor, " L"]:
    """∫ n·v^(n-1) · log(n·v^(n-1)) dv from 0 to u."""
    share = u**n
    return share * best_of_n_kl_bound(n) + (n - 1) * torch.xlogy(share, u)
