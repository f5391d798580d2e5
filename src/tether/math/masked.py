"""Statistics over the positions that count.

Every function takes `x` of any shape and a bool `mask` of the same shape. What does not count is replaced *before* any
arithmetic touches it: padding may hold NaN, and 0 · NaN is NaN, in the backward pass of (x · x) too. So
masked_sum(x * x, mask) is a right number with a NaN gradient; put the zeros into x.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x over the counted positions. Returns []."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x / n over the n counted positions. Returns []; NaN where nothing counts."""
    return masked_sum(x, mask) / mask.sum()


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Σ (x - mean)² / n over the n counted positions: the biased variance. Returns []."""
    return masked_mean(torch.where(mask, x - masked_mean(x, mask), 0.0) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the counted positions, 0 elsewhere.

        (x - mean) / √(var + 1e-8)

    The 1e-8 keeps a constant x at 0 and is far below any spread that matters. Used on a cycle's advantages, all of
    them at once: whitened per minibatch, a token's weight would depend on which others it is trained with.
    Source: Schulman et al. 2017's code, and arXiv:2403.17031, detail 13.

    Returns the shape of x.
    """
    whitened = (x - masked_mean(x, mask)) / (masked_var(x, mask) + 1e-8).sqrt()
    return torch.where(mask, whitened, 0.0)
