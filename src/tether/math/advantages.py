"""From one score per response to one advantage per token: with a critic, or against the other responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tether.math.kl import kl_k1

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def place_rewards(
    scores: Float[Tensor, " B"],
    old_logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B R"]:
    """The reward of each token: the KL penalty everywhere, the score on the last counted token.

        r_t = -β · (old_t - ref_t) + [t is the last counted token] · score

    so that a response's rewards sum to score - β · Σ log(π/ref), whose expectation is the objective. The penalty is
    k1: no other estimator has the right optimum here (see `tether.math.kl`).
    Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593); arXiv:2403.17031.

    kl_coef: β ≥ 0, reward units per nat; 0 when the KL is in the loss. Returns rewards, 0 where nothing counts.
    """
    penalty = torch.where(mask, kl_coef * kl_k1(old_logprobs, ref_logprobs), 0.0)
    is_last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    return torch.where(is_last, scores[:, None].to(penalty.dtype), 0.0) - penalty


def gae(
    rewards: Float[Tensor, "B R"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, gamma: float, lam: float
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Generalized advantage estimation, and the returns that the critic learns.

        δ_t = r_t + γ·V_{t+1} - V_t
        A_t = δ_t + γλ·A_{t+1}
        return_t = A_t + V_t

    V after the last counted token is 0, whether the response stopped or was cut: the length limit is part of the task,
    and the score on the last token already is all that is to come. λ = 1 gives Monte-Carlo returns, λ = 0 gives A = δ.
    Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438). Where actor and critic differ in λ (arXiv:2503.01491), call
    it twice.

    rewards, values  reward units; values[t] = V(prompt + response[:t]), before token t is chosen.
    gamma, lam       in [0, 1]: discount per token; how far credit travels past the critic.

    Returns (advantages, returns), before any whitening; 0 where nothing counts.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)  # this also makes V = 0 after the last counted token
    deltas = rewards + gamma * pad(values[:, 1:], (0, 1)) - values

    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):  # δ is 0 in the padding, so A is as well
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def group_advantages(g: Float[Tensor, " B"], *, responses_per_prompt: int, std: bool = False) -> Float[Tensor, " B"]:
    """How much better a response is than the others to its prompt; the advantage of each of its tokens.

        A_i = g_i - mean of the other g        = k/(k-1) · (g_i - mean g)        leave one out (RLOO)
        A_i = (g_i - mean g) / std g           with `std` (GRPO), the deviation with k-1 in the denominator

    g is what is equal for all responses at the optimum, so there every A is 0, for every sample: no noise is left that
    a falling learning rate would have to quiet. The expected gradient is that of the objective (checked by enumeration
    in tests/math), with `std` that of another one, in which a prompt weighs more the less its responses differ.
    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740); std: Shao et al. 2024 (arXiv:2402.03300).

    Arguments:
        g                     score - β · Σ log(π/ref) of whole responses, reward units; the responses to one prompt
                              stand together.
        responses_per_prompt  k ≥ 2: alone, a response has nothing to be compared with.

    Where all g of a prompt are equal up to rounding every A is exactly 0.
    """
    k = responses_per_prompt
    groups = g.view(-1, k)
    centered = groups - groups.mean(1, keepdim=True)
    centered = torch.where(
        centered.abs().amax(1, keepdim=True) <= 1e-6 * groups.abs().amax(1, keepdim=True), 0.0, centered
    )
    if std:
        deviation = centered.square().sum(1, keepdim=True).div(k - 1).sqrt()
        return torch.where(deviation > 0, centered / deviation, 0.0).flatten()
    return (k / (k - 1) * centered).flatten()
