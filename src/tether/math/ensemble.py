"""One score of several reward models: their mean, lowered where they disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def pessimistic_mean(scores: Float[Tensor, "K B"], *, pessimism: float) -> Float[Tensor, " B"]:
    """One score for each of B responses, from those of K reward models.

        -τ · log mean_k exp(-r_k / τ),   τ = 1 / (2 · pessimism)

    pessimism 0 is the mean, and towards infinity it is the minimum; for members that nearly agree it is mean -
    pessimism · variance. Always between minimum and mean, where subtracting the variance itself has no bound: [1, 2, 4]
    at τ = 0.01 would be -75. Written from the minimum with log1p and expm1, it neither overflows at small τ nor cancels
    at large.
    Source: arXiv:2606.09073; Coste et al. 2023 for ensembles against over-optimization (arXiv:2310.02743).

    scores     reward units, each model's on a scale of its own that is the same for all: normalized.
    pessimism  ≥ 0, per reward unit.
    """
    scores = scores.double()
    if pessimism == 0:
        return scores.mean(0)
    low = scores.min(0).values
    below = torch.expm1(2 * (low - scores) * pessimism).mean(0)  # in (-1, 0]
    return low - below.log1p() / pessimism / 2


def disagreement(scores: Float[Tensor, "K B"]) -> Float[Tensor, " B"]:
    """Standard deviation of K reward models' scores of each response, in reward units: over the models that there are,
    so that its square is the variance in `pessimistic_mean`'s second order."""
    return scores.double().std(0, correction=0)
