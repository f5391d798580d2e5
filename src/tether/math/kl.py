"""How far the policy is from its reference, from samples, and the controller that holds that distance.

With d = log π(a) - log ref(a) on tokens a drawn from π, the estimators of KL(π‖ref) are

    k1 = d                 unbiased; negative for many tokens
    k2 = d²/2              biased, never negative
    k3 = e^(-d) - 1 + d    unbiased, never negative, but heavy-tailed: e^(-d) explodes where π lost what ref likes

Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

Which one may be *optimized* is another question than which one estimates well, and the answer depends on its place:

    in the reward   only k1: E[k1 as a cost] is the KL, whose optimum is π* ∝ ref·e^(score/β). k2 and k3 have other
                    optima: with zero score they drift away from the reference.
    in the loss     k1's gradient is 0 in expectation (E[∇log π] = 0); k2's is the gradient of KL(π‖ref), token by
                    token; k3's is that of KL(ref‖π), whose optimum is not π*.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def kl_k1(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k1 = d = log π - log ref, nats, for each token."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k2 = d²/2, nats, for each token."""
    return (logprobs - ref_logprobs) ** 2 / 2


def kl_k3(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k3 = e^(-d) - 1 + d, nats, for each token."""
    d = logprobs - ref_logprobs
    return (-d).expm1() + d  # expm1: for a d near 0 the result, d²/2, would drown in the rounding of e^(-d) - 1


def next_kl_coef(coef: float, kl: float, *, target: float, horizon: float, responses: int) -> float:
    """β for the next cycle: a proportional controller in log space.

        e = clip(KL/target - 1, ±0.2);   β ← β · (1 + e · responses/horizon)

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593), who start at β = 0.15 with target 6, horizon 10000.

    coef       β as used in this cycle, reward units per nat.
    kl         this cycle's KL(π‖ref), nats per response.
    target     nats per response, > 0.
    horizon    responses; β changes by at most 20 % while so many are sampled.
    responses  how many this cycle sampled.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * responses / horizon)


def kl_error(kl: float, *, target: float) -> float:
    """log(KL/target), clipped to ±2; -2 where an estimate is not above 0. Both in nats per response."""
    return min(max(math.log(kl / target), -2.0), 2.0) if kl > 0 else -2.0


def hold_kl(coef: float, error: float, last_error: float, *, even: float | None) -> float:
    """β for the cycle that was just sampled: PI control of log KL by log β, in velocity form.

        log β ← log β + 1.5·(e - e_last) + 0.4·clip(e, ±1),   e = `kl_error` of this cycle

    The first part answers to a KL that rises before it is there, the second removes what error is left. Waiting a cycle
    (β for the next cycle from this one's KL) would make fast policies swing.

    In the reward β has bounds. Where the penalty outweighs the score, β > 3·even, advantages are the penalty's alone
    and a larger β only shakes the critic; where it is outweighed, β < even/10, a smaller one frees nothing. β moves no
    further there, so that it need not come back from far away (anti-windup).

    Source: Åström & Hägglund 1995, PID Controllers, chapter 3, for the velocity form and anti-windup; the gains are our
    own, tried by `bench/kl_target.py`.

    coef        β of the cycle before, reward units per nat.
    error       of this cycle.
    last_error  of the cycle before; -2 before the first.
    even        the β at which the penalty spreads as widely as the score: std of the cycle's scores over std of its
                responses' Σ log(π/ref), reward units per nat. 0 where all scores are equal: β stays, as no β would
                change what is learned. None where the KL is in the loss, whose weight does not compete with the score.
    """
    moved = coef * math.exp(1.5 * (error - last_error) + 0.4 * min(max(error, -1.0), 1.0))
    if even is None:
        return moved
    if even == 0:
        return coef
    return max(min(moved, max(coef, 3 * even)), min(coef, even / 10))
