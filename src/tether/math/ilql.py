"""Implicit Q-learning for language models: what its heads learn, and how they shift the logits that are sampled from.

Source: Snell et al. 2022 (arXiv:2206.11871); the expectile is of Kostrikov et al. 2021 (arXiv:2110.06169).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tether.math.advantages import place_rewards
from tether.math.masked import masked_sum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


def q_targets(
    scores: Float[Tensor, " B"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, gamma: float
) -> Float[Tensor, "B R"]:
    """What Q of each token is to become: r_t + γ·V(s_{t+1}), detached.

    The score is the reward of the last token; there is no KL in it. V is 0 after the last token, whether the answer
    stopped or was cut: the length limit is part of the task.

    values   reward units, V before each token is chosen.
    Returns reward units, 0 where nothing counts.
    """
    values = torch.where(mask, values.detach(), 0.0)
    nothing = torch.zeros_like(values)
    rewards = place_rewards(scores, nothing, nothing, mask, kl_coef=0.0)
    after = torch.cat([values[:, 1:], nothing[:, :1]], dim=1)
    return torch.where(mask, rewards + gamma * after, 0.0)


def q_loss(
    q: Float[Tensor, "B R"], targets: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, denominator: float
) -> Float[Tensor, ""]:
    """Σ mask · (Q - target)² / denominator, of one of the two Q; denominator: response tokens of the whole step."""
    return torch.where(mask, q - targets.detach(), 0.0).square().sum() / denominator


def expectile_loss(
    values: Float[Tensor, "B R"],
    q: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    tau: float,
    denominator: float,
) -> Float[Tensor, ""]:
    """What makes V the τ-expectile of Q over the tokens of the data.

        L = Σ mask · |τ - 1[Q < V]| · (Q - V)² / denominator

    τ = ½ is the mean over the data's tokens, so the value of whoever wrote them; τ → 1 the best of them, which needs
    no Q of a token that the data does not hold. Of a Q that is 1 with probability p and else 0, V is
    τp / (τp + (1 - τ)(1 - p)).

    values       reward units; carries the gradient.
    q            reward units: min of the two target Q, detached.
    tau          0 < τ < 1.
    denominator  response tokens in the whole optimizer step.
    """
    gap = torch.where(mask, q.detach() - values, 0.0)
    weight = torch.where(gap.detach() < 0, 1 - tau, tau)
    return masked_sum(weight * gap.square(), mask) / denominator


def ilql_logits(
    logits: Float[Tensor, "N V"], q: Float[Tensor, "N K"], tokens: Int64[Tensor, "N K"] | None, *, strength: float
) -> Float[Tensor, "N V"]:
    """The logits that ILQL samples from: log π + strength · (min Q̄ - V) of `tokens`, -inf for every other.

    V is one number for all tokens of a position, as the normalizer of π is: neither changes the distribution, so it
    takes logits as they are, and Q alone.

    At strength 0 with every token this is the language model itself. With the soft-optimal Q* of a KL-regularized
    objective, strength 1/β gives its optimum, for log π* = log ref + (Q* - V*)/β; what `q_loss` and `expectile_loss`
    learn is another Q.

    q         reward units, min of the two target Q, of each of `tokens`.
    tokens    K tokens of each position, all different; None: all of them, in order.
    strength  nats per reward unit, ≥ 0.
    """
    if tokens is None:
        return logits + strength * q
    kept = logits.gather(-1, tokens) + strength * q
    return torch.full_like(logits, -torch.inf).scatter_(-1, tokens, kept)
