"""How a gold score rises and falls as a policy is optimized against a proxy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class GoldFit(NamedTuple):
    """Gao et al.'s law, fitted: how much gold the first distance buys, and what takes it away again."""

    alpha: float  # gold units per √nat
    beta: float  # gold units per nat; of the law for RL per √nat and e-fold of distance
    start: float  # gold of the start model
    r_squared: float  # share of the spread of gold that the law explains; 1 is all


def fit_best_of_n(distance: Float[Tensor, " N"], gold: Float[Tensor, " N"], *, start: float) -> GoldFit:
    """gold - start = d · (α - β·d), by least squares: the law of best of n.

    distance: d = √KL(policy ‖ start model), √nats. start: gold at d = 0, which the law goes through.
    Source: Gao et al. 2022 (arXiv:2210.10760).
    """
    return _fit(distance, -(distance.double() ** 2), gold, start)


def fit_rl(distance: Float[Tensor, " N"], gold: Float[Tensor, " N"], *, start: float) -> GoldFit:
    """gold - start = d · (α - β·log d), by least squares: the law of reinforcement learning. As `fit_best_of_n`."""
    d = distance.double()
    return _fit(d, -torch.xlogy(d, d), gold, start)


def best_of_n_law(fit: GoldFit, distance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Gold at each distance, as `fit_best_of_n` found it."""
    d = distance.double()
    return fit.start + d * (fit.alpha - fit.beta * d)


def rl_law(fit: GoldFit, distance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Gold at each distance, as `fit_rl` found it."""
    d = distance.double()
    return fit.start + fit.alpha * d - fit.beta * torch.xlogy(d, d)


def _fit(distance: Tensor, bent: Tensor, gold: Tensor, start: float) -> GoldFit:
    won = gold.double() - start
    columns = torch.stack([distance.double(), bent], 1)
    weights = torch.linalg.lstsq(columns, won[:, None], driver="gelsd").solution[:, 0]
    left, spread = (won - columns @ weights).square().sum(), (won - won.mean()).square().sum()
    return GoldFit(float(weights[0]), float(weights[1]), start, float(1 - left / spread))
