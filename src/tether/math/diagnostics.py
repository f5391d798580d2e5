"""Numbers that say whether training is well: of the critic, and of the policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tether.math.masked import masked_var

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def explained_variance(values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> float:
    """How much of the returns' spread the critic foresaw.

        1 - Var(returns - values) / Var(returns)

    1: all of it; 0: no better than a constant; below 0: worse than one. NaN if the returns are all equal.
    """
    spread = float(masked_var(returns, mask))
    return 1 - float(masked_var(returns - values, mask)) / spread if spread > 0 else math.nan


def grouped_std(x: Float[Tensor, " B"], groups: Sequence[int]) -> float:
    """Standard deviation within groups, pooled over those with two members or more; NaN where there are none.

        √(Σ (x - mean of its group)² / Σ (members - 1))

    Of g = score - β · Σ log(π/ref), with the prompts as groups, it falls to 0 as π comes to the optimum: there every
    answer to a prompt has the same g, whoever wrote it. groups: B numbers, equal for members of one group.
    """
    index = torch.tensor(groups)
    count = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, torch.ones(len(index)).double())
    total = torch.zeros_like(count).index_add(0, index, x.double())
    squares = (x.double() - (total / count)[index]).square().sum()
    freedom = len(index) - int((count > 0).sum())
    return math.sqrt(float(squares) / freedom) if freedom else math.nan


def optimality_gap(
    scores: Float[Tensor, " B"], log_ratio_sums: Float[Tensor, " B"], *, responses_per_prompt: int, kl_coef: float
) -> float:
    """KL(π‖π*), nats per response, estimated from the sampled responses alone: how far PPO still has to go.

        g = score - β · Σ_t log(π/ref);     gap = mean over prompts of Var(g) / 2β²

    The optimum π* ∝ ref · e^(score/β) has the same g for every response to a prompt. Elsewhere

        KL(π‖π*) = log E[e^(g/β)] - E[g]/β ≈ Var(g) / 2β²,

    to second order. The variance is unbiased (ddof 1), so two responses a prompt are enough; there the exact form
    would be off by half. It holds for γ = 1, no entropy bonus, no top-k or top-p, and the KL in the reward.
    It cannot see what π no longer samples: a collapsed policy reads as optimal, so read it beside the entropy.
    Derivation: docs/algorithm.md.

    scores: reward units; the responses to a prompt are neighbors. log_ratio_sums: nats, Σ (old - ref) over a response.
    """
    g = (scores.double() - kl_coef * log_ratio_sums.double()).view(-1, responses_per_prompt)
    return float(g.var(dim=1, correction=1).mean()) / (2 * kl_coef**2)


def optimality_gap_logmeanexp(g: Float[Tensor, "*prompts n"], kl_coef: float) -> float:
    """KL(π‖π*), nats per response, exactly but for sampling noise: log mean e^(g/β) - mean(g)/β.

    Needs thousands of responses to one prompt: below that it is biased to 0. g: reward units, see `optimality_gap`.
    """
    x = g.double() / kl_coef
    log_mean_exp = torch.logsumexp(x, dim=-1) - math.log(x.shape[-1])
    return float((log_mean_exp - x.mean(dim=-1)).mean())


def distinct_pairs(responses: Sequence[Sequence[int]]) -> float:
    """Distinct-2 (Li et al. 2016, arXiv:1510.03055): different pairs of neighboring tokens over all pairs, in (0, 1].

    responses: token ids, B of any length. NaN where no response has two tokens. It falls with the number of tokens, so
    compare only samples of one size.
    """
    pairs = [pair for ids in responses for pair in pairwise(ids)]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def shared_phrase(responses: Sequence[Sequence[int]], *, length: int = 4) -> float:
    """Share of the responses that contain the most common phrase (`length` token ids in a row), in [0, 1].

    Each response counts once, however often it repeats the phrase. NaN where no response is long enough.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for ids in responses:
        found.update({tuple(ids[t : t + length]) for t in range(len(ids) - length + 1)})
    return max(found.values()) / len(responses) if found else math.nan
