"""What is minimized. Every loss is a sum over counted positions divided by a `denominator` that the caller counts.

The denominator belongs to the whole optimizer step, over every microbatch and rank: a mean over each microbatch,
averaged, would be another objective, in which a token weighs more the fewer others share its microbatch. This way the
losses, gradients and metrics of the microbatches add up to those of the step. Two metrics do not add:
`policy/ratio_min` and `policy/ratio_max` combine by min and max.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tether.math.kl import kl_k2, kl_k3
from tether.math.masked import masked_sum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def clipped_policy_loss(
    new_logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    clip: float | tuple[float, float],
    denominator: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """PPO's clipped surrogate, negated so that it is minimized.

        L = Σ mask · max(-A·ρ, -A·clip(ρ, 1-ε_low, 1+ε_high)) / denominator,   ρ = exp(new - old)

    The gradient of a token is cut once the ratio has moved past the clip in the direction that its advantage asks for,
    never when it has moved the wrong way. At ρ = 1 the gradient is REINFORCE's, -A·∇log π.
    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); apart for low and high: DAPO (arXiv:2503.14476).

    new_logprobs  nats; carries the gradient.
    old_logprobs  nats: the policy as it was when the cycle began, not the reference.
    advantages    reward units, whitened or not.
    clip          ε > 0, no unit, 0.2 in the paper; or (ε_low, ε_high).
    denominator   response tokens in the whole optimizer step.

    Returns (loss, metrics).
    """
    low, high = (clip, clip) if isinstance(clip, (int, float)) else clip
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0.0)  # before exp: padding may be -inf
    ratio = log_ratio.clamp(-20, 20).exp()  # e^20 ≈ 5e8: a lost token costs much, but not inf
    loss = masked_sum(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)), mask)
    loss = loss / denominator
    cut = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return loss, _ratio_metrics(loss, old_logprobs, new_logprobs, mask, ratio, cut, denominator)


def cispo_loss(
    new_logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    clip: tuple[float, float],
    denominator: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """REINFORCE with a bounded importance weight: no token's gradient is cut, its weight is.

        L = -Σ mask · sg(clip(ρ, 1-ε_low, 1+ε_high)) · A · log π / denominator,   ρ = exp(new - old)

    At ρ = 1 the gradient is that of `clipped_policy_loss`. Source: MiniMax-M1 2025 (arXiv:2506.13585, eq. 4).
    Arguments and metrics as there; policy/clip_fraction counts tokens whose weight is bounded.
    """
    low, high = clip
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0.0)
    ratio = log_ratio.detach().clamp(-20, 20).exp()
    weight = ratio.clamp(1 - low, 1 + high)
    loss = -masked_sum(weight * advantages * torch.where(mask, new_logprobs, 0.0), mask) / denominator
    return loss, _ratio_metrics(loss, old_logprobs, new_logprobs, mask, ratio, weight != ratio, denominator)


def importance_weights(
    old_logprobs: Float[Tensor, "B R"],
    sampled_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    cap: float,
) -> Float[Tensor, "B R"]:
    """Weight of a token's policy loss where another policy sampled it: min(π_old/μ, cap); 1 outside the mask.

    μ is the policy that sampled, π_old the one that the ratio ρ of the surrogates begins at. In expectation over μ a
    weighted sum is that over π_old, less what the cap cuts off; without a cap one unlikely token could outweigh all
    others. For whole responses the factor would be the product over their tokens, which scatters far more.
    Source: truncated importance sampling, Ionides 2008; for policy gradients V-trace's ρ̄, Espeholt et al. 2018
    (arXiv:1802.01561, eq. 1).

    old_logprobs, sampled_logprobs  nats.
    cap                             at least 1, no unit.
    """
    log_ratio = torch.where(mask, old_logprobs - sampled_logprobs, 0.0)
    return log_ratio.exp().clamp(max=cap)


def _ratio_metrics(
    loss: Tensor,
    old_logprobs: Tensor,
    new_logprobs: Tensor,
    mask: Tensor,
    ratio: Tensor,
    cut: Tensor,
    denominator: float,
) -> dict[str, Tensor]:
    """What both surrogates tell of the ratio; cut: tokens at the clip."""
    with torch.no_grad():
        return {
            "policy/loss": loss.detach(),
            "policy/kl_old_new": masked_sum(kl_k3(old_logprobs, new_logprobs), mask) / denominator,  # nats per token
            "policy/clip_fraction": masked_sum(cut.float(), mask) / denominator,  # tokens whose gradient is cut
            "policy/ratio_mean": masked_sum(ratio, mask) / denominator,
            "policy/ratio_min": torch.where(mask, ratio, torch.inf).min(),
            "policy/ratio_max": torch.where(mask, ratio, -torch.inf).max(),
        }


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    clip: float | None,
    denominator: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Squared error of the critic, pessimistic about moves further than ε from the old value.

        L = ½ · Σ mask · max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²) / denominator

    Once a value has moved by ε towards its return, the clipped branch is the larger one and has no gradient.
    Source: the code of Schulman et al. 2017; Ziegler et al. 2019.

    values       reward units; carries the gradient.
    old_values   reward units: what the critic said when the cycle began.
    returns      reward units: from `gae`, never whitened.
    clip         ε > 0 in reward units: it depends on the scale of the scores. None: plain squared error.
    denominator  response tokens in the whole optimizer step.

    Returns (loss, metrics).
    """
    errors = torch.where(mask, values - returns, 0.0) ** 2
    clipped_errors = errors
    if clip is not None:
        clipped_values = torch.clamp(values, old_values - clip, old_values + clip)
        clipped_errors = torch.where(mask, clipped_values - returns, 0.0) ** 2
    loss = masked_sum(torch.maximum(errors, clipped_errors), mask) / 2 / denominator
    cut = (clipped_errors > errors).float()  # tokens whose gradient is cut
    return loss, {"value/loss": loss.detach(), "value/clip_fraction": masked_sum(cut, mask) / denominator}


def entropy_mean(entropy: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, denominator: float) -> Float[Tensor, ""]:
    """Mean entropy of the next-token distribution, nats per token: *subtract* c2 times it from the loss.

    `entropy` is exact, logsumexp(z) - Σ p·z over the vocabulary (`token_logprobs` gives it): -log p of the
    sampled token has the same mean, but its gradient, averaged, is 0.
    """
    return masked_sum(entropy, mask) / denominator


def kl_loss(
    new_logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    denominator: float,
) -> Float[Tensor, ""]:
    """KL to the reference as a loss: the mean of k2 = (new - ref)²/2, nats per token.

    On tokens of π its gradient is E[(log π - log ref)·∇log π] = ∇KL(π‖ref), token by token; k1 would have none and k3
    that of KL(ref‖π). What it misses is how a token changes the KL of the tokens after it: only the reward sees that.
    Source: Schulman 2020; checked by enumeration in tests/math. new_logprobs carries the gradient.
    """
    new_logprobs, ref_logprobs = (torch.where(mask, x, 0.0) for x in (new_logprobs, ref_logprobs))
    return kl_k2(new_logprobs, ref_logprobs).sum() / denominator


def bradley_terry_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    targets: Float[Tensor, " B"],
    weights: Float[Tensor, " B"],
    *,
    center: float,
    denominator: float,
    decided: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Negative log-likelihood of which response wins, for training a reward model.

        L = Σ w · [-T·log σ(r_w - r_l) - (1 - T)·log σ(r_l - r_w) + center · (r_w + r_l)²] / denominator

    T = 1: the chosen one was preferred; T = 0.5: a tie, whose minimum is at equal scores. The first two terms see
    differences only, so scores may drift by any constant; centering holds them around 0.
    Source: Bradley & Terry 1952; Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); centering: Eisenstein et al. 2023
    (arXiv:2312.09244).

    chosen, rejected  scores in reward units; carry the gradient.
    targets, weights  T, in [0, 1]; w > 0: a pair of weight 2 counts as two pairs.
    center            ≥ 0; 0 turns it off.
    denominator       sum of the weights in the whole optimizer step.
    decided           pairs with T ≠ 0.5 in the whole optimizer step; at least 1.

    Returns (loss, metrics).
    """
    margin = chosen - rejected
    preference = -(weights * (targets * logsigmoid(margin) + (1 - targets) * logsigmoid(-margin))).sum() / denominator
    loss = preference + center * (weights * (chosen + rejected) ** 2).sum() / denominator
    metrics = {
        "reward_model/loss": preference.detach(),  # without centering: log 2 ≈ 0.693 means knowing nothing
        # Of decided pairs; strictly greater, so that a constant model scores 0:
        "reward_model/accuracy": (margin * (targets - 0.5) > 0).float().sum() / decided,
        "reward_model/margin": (weights * margin.detach()).sum() / denominator,
    }
    return loss, metrics


def nll_loss(logprobs: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], *, denominator: float) -> Float[Tensor, ""]:
    """Negative log-likelihood, -Σ mask · log π / denominator, nats per token; denominator: trained tokens of a step."""
    return -masked_sum(logprobs, mask) / denominator
