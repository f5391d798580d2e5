"""Q-learning for language models: the policy's own log-probabilities are the advantages, so no Q is learned apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tether.math.advantages import gae, place_rewards

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def bellman_loss(
    logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    scores: Float[Tensor, " B"],
    mask: Bool[Tensor, "B R"],
    *,
    kl_coef: float,
    lam: float,
    denominator: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B R"]]:
    """The squared soft-Bellman residual: PPO's own advantages, with the gradient left on, driven to 0.

        r_t = -β · (log π_t - log ref_t) + [t is the last counted token] · score
        A   = gae(r, V; γ = 1, λ)
        L   = ½ · Σ mask · A² / denominator

    Nothing is detached: π learns through r, and V through A. For the KL-regularized objective log π* - log ref =
    (Q* - V*) / β, so every A is 0 at π = π*, V = V*, whatever tokens the data holds; and nowhere else, where every
    token has been seen after every prefix. So the data may come from any policy, or from nobody's.

    λ = 0 ties neighbors together, r_t + V_{t+1} = V_t (path consistency, Nachum et al. 2017, arXiv:1702.08892): low in
    variance, but what the score says travels one token at a time. λ = 1 is the whole rest of the response, of which
    t = 0 alone is TBRM (Yuan et al. 2025, arXiv:2505.15311, who prove convergence from arbitrary data).

    logprobs       nats; carries the gradient.
    ref_logprobs   nats.
    values         reward units, V before each token is chosen; carries the gradient.
    scores         reward units.
    kl_coef, lam   β > 0, reward units per nat; λ in [0, 1].
    denominator    response tokens in the whole optimizer step.

    Returns (loss, A in reward units, 0 where nothing counts).
    """
    rewards = place_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
    residuals, _ = gae(rewards, values, mask, gamma=1.0, lam=lam)
    return residuals.square().sum() / 2 / denominator, residuals
