"""How sure a mean is, from the sample alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_AT_ONCE = 2**20  # drawn values in memory


class Interval(NamedTuple):
    """A mean and the interval it is in, in the values' unit."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Float[Tensor, " prompts"], *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """The mean of `values` with its percentile-bootstrap interval: as many drawn with replacement, `draws` times.

    One value a *prompt*: the responses to one prompt are not independent, so it is prompts that are drawn. A single
    value says nothing of its own spread: low = mean = high. The same seed gives the same interval.
    Source: Efron 1979.
    """
    count, values = len(values), values.double()
    generator, at_once = torch.Generator().manual_seed(seed), max(1, _AT_ONCE // count)
    means = [
        values[torch.randint(count, (min(at_once, draws - start), count), generator=generator)].mean(1)
        for start in range(0, draws, at_once)
    ]
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
