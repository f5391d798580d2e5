"""Losses that learn from preferences without a reward model: of pairs of answers, or of single answers with a label.

An answer's implicit reward is β·l, l = Σ_t log π - log ref over its tokens, nats. A label is a probability T: of a
pair, that the chosen answer is the better one (0.5 is a tie); of a single answer, that it is good. T may be moved by
`noisy_targets`. Each loss is a sum, weighted by w, divided by a `denominator` that the caller counts: the weights of
the whole optimizer step, so that the microbatches of a step add up to it.

Which loss has which optimum, found by enumeration in tests/math/test_preference_losses.py: docs/dpo.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_CERTAIN = -1e-6  # mean log-prob, nats per token, from which on the odds of an answer are taken to be no higher


def sum_answers(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, average: bool) -> Float[Tensor, " B"]:
    """Σ x over each answer's counted tokens, or their mean. Positions that do not count may hold anything."""
    total = torch.where(mask, x, 0.0).sum(1)
    return total / mask.sum(1) if average else total


def noisy_targets(probabilities: Float[Tensor, " B"], *, smoothing: float, flipped: float) -> Float[Tensor, " B"]:
    """T from a label's own probability p, where labels are known to be noisy; a tie stays 0.5.

    smoothing ε   T = p·(1-ε) + (1-p)·ε       1 → 1-ε: never quite sure (cDPO, Mitchell 2023)
    flipped ε     T = (p - ε) / (1 - 2ε)      1 → (1-ε)/(1-2ε), 0 → -ε/(1-2ε): on labels of which a share ε was
                                              flipped, the expected loss is that of the labels before they were
                                              (Chowdhury et al. 2024, arXiv:2403.00409)
    """
    return (probabilities + smoothing * (1 - 2 * probabilities) - flipped) / (1 - 2 * flipped)


def sigmoid_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, beta: float, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """DPO: Bradley–Terry with the implicit rewards as scores.

        L = Σ w · [-T·log σ(β·h) - (1 - T)·log σ(-β·h)] / denominator,   h = l_chosen - l_rejected

    At h = 0, so before the first step, it is log 2. If people choose by P = σ(Δscore) and T is P, or their choices
    themselves, its minimum is π* ∝ ref·exp(score/β): PPO's, with β of the KL.
    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).

    chosen, rejected  l of each answer, nats; carry the gradient.
    targets, weights  T; w > 0.
    beta              β > 0: log-odds per nat. Less lets the policy go further for the same label.
    """
    return _logistic(beta * (chosen - rejected), targets, weights) / denominator


def ipo_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, beta: float, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """IPO: h is drawn to 1/(2τ) and no further, so that labels without noise cannot drive it to infinity.

        L = Σ w · [T·(h - 1/(2τ))² + (1 - T)·(h + 1/(2τ))²] / denominator,   τ = β

    Its minimum is π ∝ ref·exp(p(y ≻ y')/τ), where p is the chance to win against an answer y' of the data: how often an
    answer wins counts, and not by how much. Before the first step it is 1/(4β²).
    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036): l is a sum over tokens there, as here.

    Arguments as of `sigmoid_loss`.
    """
    h, goal = chosen - rejected, 1 / (2 * beta)
    return (weights * (targets * (h - goal) ** 2 + (1 - targets) * (h + goal) ** 2)).sum() / denominator


def simpo_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, beta: float, gamma: float, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """SimPO: the mean log-prob of an answer is its reward, without a reference; the better one has to lead by γ.

        L = Σ w · [-T·log σ(β·d - γ) - (1 - T)·log σ(-β·d - γ)] / denominator,   d = m_chosen - m_rejected

    The reference is ignored: for answers of one length, γ = 0 and T = σ(Δscore), the minimum is softmax(score/β).
    Source: Meng et al. 2024, eq. 6 (arXiv:2405.14734).

    chosen, rejected  m: mean log-prob of each answer's tokens under the policy, nats per token; carry the gradient.
    beta, gamma       β > 0, log-odds per nat; γ ≥ 0, log-odds.
    """
    margin = beta * (chosen - rejected)
    return _logistic(margin, targets, weights, lead=gamma) / denominator


def orpo_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """ORPO's odds-ratio term, to be added to the negative log-likelihood of the chosen answer; no reference.

        L = Σ w · [-T·log σ(o) - (1 - T)·log σ(-o)] / denominator,   o = log odds(m_chosen) - log odds(m_rejected)

    Source: Hong et al. 2024, eq. 6–7 (arXiv:2403.07691). Arguments as of `simpo_loss`.
    """
    return _logistic(log_odds(chosen) - log_odds(rejected), targets, weights) / denominator


def log_odds(mean_logprobs: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log p - log(1 - p) of p = exp(m), m ≤ 0: finite with its gradient wherever m is.

    log(1 - eᵐ) is log(-expm1(m)) near 0 and log1p(-eᵐ) far from it; at m = 0 the odds would be infinite.
    """
    m = mean_logprobs.clamp(max=_CERTAIN)
    near = m > -math.log(2)
    # Each branch gets arguments at which it is well, for where() multiplies the other's gradient by 0, not away.
    log1mexp = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, m, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, m))),
    )
    return mean_logprobs - log1mexp


def unpaired_loss(
    log_ratios: Float[Tensor, " B"], values: Float[Tensor, " B"],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, beta: float, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """Logistic regression of single labels on the implicit reward, with a level of its own for every prompt.

        L = Σ w · [-T·log σ(β·l + V(x)) - (1 - T)·log σ(-(β·l + V(x)))] / denominator

    If an answer is called good with P = σ(score), its minimum is π*, and V is V* = β·log Σ ref·exp(score/β): what the
    bar of the people who labeled is, V takes up. Without it (V = 0) the policy would have to.

    log_ratios  l of each answer, nats; carries the gradient.
    values      V of each answer's prompt, log-odds; carries the gradient.
    """
    return _logistic(beta * log_ratios + values, targets, weights) / denominator


def kto_loss(
    log_ratios: Float[Tensor, " B"], kl: Float[Tensor, ""],
    targets: Float[Tensor, " B"], weights: Float[Tensor, " B"], *, beta: float, denominator: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """KTO: a gain or loss that levels off on both sides, against the KL as a point of reference.

        L = Σ w · [T·σ(-u) + (1 - T)·σ(u)] / denominator,   u = β·(l - z)

    It is linear in σ(u): whatever is good more often than not is raised without end and the rest is lowered, so its
    minimum is near the reference restricted to T > ½, however strong the preferences are.
    Source: Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306), with λ_D = λ_U = 1.

    log_ratios  l of each answer, nats; carries the gradient.
    kl          z: see `kto_point`; of the whole optimizer step.
    """
    u = beta * (log_ratios - kl)
    return (weights * (targets * torch.sigmoid(-u) + (1 - targets) * torch.sigmoid(u))).sum() / denominator


def kto_point(mismatched_log_ratios: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """z = max(0, mean l) over answers to other prompts: KTO's estimate of the KL, nats; without a gradient."""
    return mismatched_log_ratios.detach().mean().clamp(min=0)


def _logistic(margins: Tensor, targets: Tensor, weights: Tensor, *, lead: float = 0.0) -> Tensor:
    """Σ w · [-T·log σ(margin - lead) - (1 - T)·log σ(-margin - lead)]."""
    return -(weights * (targets * logsigmoid(margins - lead) + (1 - targets) * logsigmoid(-margins - lead))).sum()
