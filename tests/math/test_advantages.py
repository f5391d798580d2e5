"""Reward placement and GAE, by hand, by identity, and against a loop over one response at a time."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import gae, group_advantages, place_rewards

LENGTHS = [5, 1, 3]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def ragged(seed: int) -> torch.Tensor:
    """[3, 5] numbers with NaN in the padding."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(MASK, x, math.nan)


def test_rewards_of_a_response_sum_to_its_score_minus_the_kl():
    old, ref, scores = ragged(0), ragged(1), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rewards = place_rewards(scores, old, ref, MASK, kl_coef=0.3)
    for i, n in enumerate(LENGTHS):
        want = scores[i] - 0.3 * sum(old[i, t] - ref[i, t] for t in range(n))
        assert_close(rewards[i].sum(), want)


def test_the_score_sits_on_the_last_counted_token_and_nowhere_else():
    same = torch.zeros(3, 5)
    rewards = place_rewards(torch.tensor([1.0, 2.0, 3.0]), same, same, MASK, kl_coef=0.3)
    want = torch.zeros(3, 5)
    want[0, 4], want[1, 0], want[2, 2] = 1.0, 2.0, 3.0
    assert torch.equal(rewards, want)


def test_every_token_pays_for_its_own_log_ratio():
    old, ref = ragged(0), ragged(1)
    rewards = place_rewards(torch.zeros(3), old, ref, MASK, kl_coef=0.3)
    assert_close(rewards[MASK], -0.3 * (old - ref)[MASK])
    assert (rewards[~MASK] == 0).all()


def test_scores_in_float64_do_not_change_the_dtype_of_rewards():
    zeros = torch.zeros(3, 5)
    assert place_rewards(torch.ones(3, dtype=torch.float64), zeros, zeros, MASK, kl_coef=0.1).dtype == torch.float32


def test_gae_of_three_steps_worked_by_hand():
    # δ₂ = 1 - .3 = .7; δ₁ = .3 - .2 = .1, A₁ = .1 + .95·.7 = .765; δ₀ = .2 - .1 = .1, A₀ = .1 + .95·.765 = .82675
    advantages, returns = gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.2, 0.3]]), torch.ones(1, 3, dtype=torch.bool),
        gamma=1.0, lam=0.95,
    )  # fmt: skip
    assert_close(advantages, torch.tensor([[0.82675, 0.765, 0.7]]))
    assert_close(returns, torch.tensor([[0.92675, 0.965, 1.0]]))


def test_gae_discounts_by_gamma_once_a_token():
    # γ = .5, λ = .5: δ₁ = 1 - .4 = .6; δ₀ = 0 + .5·.4 - .1 = .1; A₀ = .1 + .25·.6 = .25
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.1, 0.4]]), torch.ones(1, 2, dtype=torch.bool), gamma=0.5, lam=0.5
    )
    assert_close(advantages, torch.tensor([[0.25, 0.6]]))
    assert_close(returns, torch.tensor([[0.35, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0)])
def test_gae_is_the_discounted_sum_of_the_deltas_of_its_own_response(gamma, lam):
    rewards, values = ragged(2), ragged(3)
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for i, n in enumerate(LENGTHS):
        r, v = rewards[i, :n].tolist(), [*values[i, :n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        assert advantages[i, :n].tolist() == pytest.approx(want, abs=1e-12)
        assert returns[i, :n].tolist() == pytest.approx([a + b for a, b in zip(want, v[:n], strict=True)], abs=1e-12)


def test_with_lambda_1_returns_are_what_the_response_still_earned_whatever_the_critic_says():
    rewards = ragged(2)
    _, returns = gae(rewards, ragged(3), MASK, gamma=1.0, lam=1.0)
    to_go = torch.where(MASK, rewards, 0.0).flip(1).cumsum(1).flip(1)
    assert_close(returns[MASK], to_go[MASK])


def test_with_lambda_0_advantages_are_the_deltas():
    advantages, _ = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), MASK[:1, :2], gamma=1.0, lam=0.0)
    assert_close(advantages, torch.tensor([[-0.25, 0.75]]))


def test_nothing_is_bootstrapped_after_the_last_counted_token_whether_it_stopped_or_was_cut():
    rewards, values = torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 100.0]])  # the critic's word on a pad: not heard
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages[0, 1] == -0.5  # r + 0 - V
    assert returns[0, 1] == 0.0


def test_padding_changes_neither_advantages_nor_returns_and_holds_zeros_after():
    rewards, values = ragged(2), ragged(3)
    nan = torch.full((3, 4), math.nan, dtype=torch.float64)
    wide_mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    narrow = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    wide = gae(torch.cat([rewards, nan], 1), torch.cat([values, nan], 1), wide_mask, gamma=0.9, lam=0.8)
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b[:, :5])
        assert (b[~wide_mask] == 0).all()


def test_actor_and_critic_may_use_lambdas_of_their_own():
    rewards, values = ragged(2), ragged(3)
    advantages, _ = gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert_close(returns[1, 0], rewards[1, 0])  # Monte Carlo for the critic ...
    assert_close(advantages[1, 0], rewards[1, 0] - values[1, 0])
    assert not torch.allclose(returns[0, 0], advantages[0, 0] + values[0, 0])  # ... and not for the actor


def test_three_right_of_eight_against_the_others_and_against_the_group():
    g = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.float64)
    others = group_advantages(g, responses_per_prompt=8)  # 1 - 2/7, 0 - 3/7
    assert_close(others, torch.tensor([5 / 7] * 3 + [-3 / 7] * 5, dtype=torch.float64))
    scaled = group_advantages(g, responses_per_prompt=8, std=True)  # .625 / √(15/56), -.375 / √(15/56)
    assert_close(scaled, torch.tensor([1.207615] * 3 + [-0.724569] * 5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_responses_are_compared_with_those_to_the_same_prompt_alone():
    g = torch.tensor([1.0, 3.0, 100.0, 104.0])
    assert group_advantages(g, responses_per_prompt=2).tolist() == [-2.0, 2.0, -4.0, 4.0]


@pytest.mark.parametrize("std", [False, True])
def test_a_group_that_is_equal_up_to_rounding_has_advantages_of_exactly_zero(std):
    g = torch.tensor([0.7, 0.7 + 1e-7, 0.7 - 1e-7, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0])
    advantages = group_advantages(g, responses_per_prompt=3, std=std)
    assert advantages[:6].tolist() == [0.0] * 6
    assert advantages[6] < 0 < advantages[8]
