"""Statistics over the positions that count.

`x` and its mask have one shape, any. What does not count is replaced *before* any arithmetic touches it: padding may
hold NaN, and 0 · NaN is NaN, in the backward pass of (x · x) too. So masked_sum(x * x, mask) is a right number with a
NaN gradient; put the zeros into x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def masked_sum(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Σ x over the counted positions."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Σ x / n over the n counted positions; NaN where nothing counts."""
    return masked_sum(x, mask) / mask.sum()


def masked_var(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Σ (x - mean)² / n over the n counted positions: the biased variance."""
    return masked_mean(torch.where(mask, x - masked_mean(x, mask), 0.0) ** 2, mask)


def whiten(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Mean 0 and variance 1 over the counted positions, 0 elsewhere.

        (x - mean) / √(var + 1e-8)

    The 1e-8 keeps a constant x at 0 and is far below any spread that matters. Used on a cycle's advantages, all of
    them at once: whitened per minibatch, a token's weight would depend on which others it is trained with.
    Source: Schulman et al. 2017's code, and arXiv:2403.17031, detail 13.
    """
    whitened = (x - masked_mean(x, mask)) / (masked_var(x, mask) + 1e-8).sqrt()
    return torch.where(mask, whitened, 0.0)
