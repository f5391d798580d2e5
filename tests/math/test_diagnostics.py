"""Explained variance by hand; the optimality gap against KL(π‖π*) by enumeration of the bandit E1 (eight actions)."""

import itertools
import math

import pytest
import torch

from tether.math import (
    distinct_pairs,
    explained_variance,
    grouped_std,
    optimality_gap,
    optimality_gap_logmeanexp,
    shared_phrase,
)

K = torch.arange(8, dtype=torch.float64)
REFERENCE = torch.softmax(-0.3 * K, 0)
SCORES = torch.sin(K)


def optimum(beta: float) -> torch.Tensor:
    return torch.softmax(REFERENCE.log() + SCORES / beta, 0)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p * (p / q).log()).sum())


def population(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A policy whose probabilities are multiples of 1/64, and 64 actions that represent it exactly."""
    return torch.tensor(counts, dtype=torch.float64) / 64, torch.arange(8).repeat_interleave(torch.tensor(counts))


NEAR_OPTIMUM = [20, 24, 12, 3, 1, 1, 1, 2]  # of β = 1, rounded to 64ths


def test_explained_variance_worked_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 1.0, 2.0, math.nan]])  # variance 2/3
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(
        0, abs=1e-6
    )  # a constant, even wrong
    values = torch.tensor([[0.0, 1.0, 1.0, math.nan]])  # errors 0, 0, 1: variance 2/9
    assert explained_variance(values, returns, mask) == pytest.approx(2 / 3, rel=1e-5)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3, rel=1e-5)  # Var(2R) = 4 Var(R)


def test_explained_variance_of_equal_returns_is_not_a_number():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert math.isnan(explained_variance(torch.randn(1, 3), torch.ones(1, 3), mask))


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_at_the_optimum_every_pair_of_responses_has_no_gap(beta):
    g_scores, log_ratios = SCORES, (optimum(beta) / REFERENCE).log()
    pairs = torch.tensor(list(itertools.combinations(range(8), 2))).flatten()
    gap = optimality_gap(g_scores[pairs], log_ratios[pairs], responses_per_prompt=2, kl_coef=beta)
    assert gap == pytest.approx(0, abs=1e-20)
    assert optimality_gap_logmeanexp(g_scores - beta * log_ratios, beta) == pytest.approx(0, abs=1e-12)


def test_the_gap_of_pairs_is_an_unbiased_estimate_of_half_the_variance_of_g_over_beta_squared():
    policy, actions = population(NEAR_OPTIMUM)
    log_ratios = (policy / REFERENCE).log()
    g = SCORES - 0.5 * log_ratios
    variance = float((policy * (g - (policy * g).sum()) ** 2).sum())
    pairs = torch.cartesian_prod(actions, actions).flatten()  # every pair as often as two draws give it
    gap = optimality_gap(SCORES[pairs], log_ratios[pairs], responses_per_prompt=2, kl_coef=0.5)
    assert gap == pytest.approx(variance / (2 * 0.5**2), rel=1e-9)


def test_the_gap_compares_responses_to_the_same_prompt_only():
    scores = torch.tensor([0.0, 0.0, 100.0, 100.0, -7.0, -7.0])  # prompts differ, responses to one do not
    assert optimality_gap(scores, torch.zeros(6), responses_per_prompt=2, kl_coef=1.0) == 0
    # one prompt, g = 0, 1, 2: variance 1 with ddof 1
    assert optimality_gap(torch.arange(3.0), torch.zeros(3), responses_per_prompt=3, kl_coef=0.5) == pytest.approx(2.0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_log_mean_exp_form_is_the_kl_to_the_optimum(beta):
    policy, actions = population([8] * 8)
    g = (SCORES - beta * (policy / REFERENCE).log())[actions]
    assert optimality_gap_logmeanexp(g, beta) == pytest.approx(kl(policy, optimum(beta)), rel=1e-9)
    assert optimality_gap_logmeanexp(torch.stack([g, g + 3]), beta) == pytest.approx(
        kl(policy, optimum(beta)), rel=1e-9
    )


def test_near_the_optimum_half_the_variance_is_the_kl_to_second_order():
    target, direction = optimum(1.0), torch.cos(3 * K)
    errors = []
    for distance in (0.1, 0.05):
        policy = torch.softmax(target.log() + distance * direction, 0)
        g = SCORES - (policy / REFERENCE).log()
        variance = float((policy * (g - (policy * g).sum()) ** 2).sum())
        errors.append(abs(variance / 2 / kl(policy, target) - 1))
    assert errors[0] < 0.1
    assert errors[1] < 0.6 * errors[0]  # halving the distance halves the relative error


def test_with_two_responses_the_log_mean_exp_form_would_see_half_of_the_gap():
    policy, actions = population(NEAR_OPTIMUM)
    g = SCORES - (policy / REFERENCE).log()
    pairs = g[torch.cartesian_prod(actions, actions)]
    assert optimality_gap_logmeanexp(pairs, 1.0) / kl(policy, optimum(1.0)) == pytest.approx(0.5, abs=0.1)


def test_a_collapsed_policy_reads_as_optimal():
    # all its mass on one action: nothing to compare, though KL(π‖π*) = -ln π*(0) is 1.64 nat
    same = torch.zeros(64)
    assert optimality_gap(same, same - REFERENCE[0].log(), responses_per_prompt=2, kl_coef=1.0) == 0
    assert -optimum(1.0)[0].log() > 1.6


def test_distinct_pairs_and_the_shared_phrase_by_hand():
    # pairs: 12 23 31 12 | 12 24 | (none): 6 pairs, {12, 23, 31, 24} distinct
    responses = [[1, 2, 3, 1, 2], [1, 2, 4], [9]]
    assert distinct_pairs(responses) == pytest.approx(4 / 6)
    # phrases of two: 12 stands in two of the three responses (twice in the first, which counts once)
    assert shared_phrase(responses, length=2) == pytest.approx(2 / 3)
    assert shared_phrase(responses, length=3) == pytest.approx(1 / 3)
    assert math.isnan(shared_phrase(responses, length=6))
    assert math.isnan(distinct_pairs([[1], [2]]))


def test_a_courtesy_at_the_end_of_every_answer_is_its_shared_phrase():
    different = [[10 * i + k for k in range(8)] for i in range(20)]
    assert shared_phrase(different) == pytest.approx(1 / 20)
    assert shared_phrase([[*ids, 7, 7, 8, 9] for ids in different]) == 1.0


def test_the_deviation_within_groups_is_pooled_over_those_of_two_and_more():
    # group 0: 1, 3 (squares 2, freedom 1); group 2: 0, 3, 6 (squares 18, freedom 2); group 5: one member, no freedom
    x = torch.tensor([1.0, 0.0, 3.0, 100.0, 3.0, 6.0])
    assert grouped_std(x, [0, 2, 0, 5, 2, 2]) == pytest.approx(math.sqrt(20 / 3))
    assert math.isnan(grouped_std(x, [0, 1, 2, 3, 4, 5]))
    assert grouped_std(torch.tensor([7.0, 7.0]), [1, 1]) == 0
