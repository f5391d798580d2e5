"""One score of several reward models. Numbers: the published goldens, mpmath-free identities and limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import disagreement, pessimistic_mean

ONE_TWO_FOUR = torch.tensor([[1.0], [2.0], [4.0]])


@pytest.mark.parametrize(("tau", "golden"), [(1, 1.7496), (5, 2.1838), (100, 2.3256)])
def test_one_two_four_at_three_temperatures(tau, golden):
    found = pessimistic_mean(ONE_TWO_FOUR, pessimism=1 / (2 * tau))
    assert found.item() == pytest.approx(golden, abs=5e-5)


def test_pessimism_zero_is_the_mean_and_a_great_one_the_minimum():
    assert_close(pessimistic_mean(ONE_TWO_FOUR, pessimism=0), torch.tensor([7 / 3], dtype=torch.float64))
    assert_close(pessimistic_mean(ONE_TWO_FOUR, pessimism=1e308), torch.tensor([1.0], dtype=torch.float64))


def test_at_a_small_temperature_it_stays_at_the_minimum_where_the_variance_would_be_subtracted_without_bound():
    # τ = .01: only the smallest counts, 1 + τ·log 3; mean - Var/2τ would be -75
    assert pessimistic_mean(ONE_TWO_FOUR, pessimism=50).item() == pytest.approx(1 + 0.01 * math.log(3), abs=1e-12)


@pytest.mark.parametrize("pessimism", [1e-300, 1e-12, 1e-6])
def test_nothing_cancels_as_pessimism_goes_to_zero(pessimism):
    assert pessimistic_mean(ONE_TWO_FOUR, pessimism=pessimism).item() == pytest.approx(7 / 3, abs=2 * pessimism + 1e-14)


def test_to_second_order_it_is_the_mean_less_pessimism_times_the_variance():
    scores = torch.tensor([[0.30, -5.0], [0.31, -5.02], [0.35, -5.01]], dtype=torch.float64)
    mean, variance = scores.mean(0), scores.var(0, correction=0)
    assert_close(pessimistic_mean(scores, pessimism=0.5), mean - 0.5 * variance, atol=1e-5, rtol=0)
    assert not torch.allclose(pessimistic_mean(scores, pessimism=0.5), mean, atol=1e-5, rtol=0)
    assert_close(disagreement(scores) ** 2, variance)


def test_adding_a_number_to_every_member_adds_it_to_the_score():
    scores = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(pessimistic_mean(scores + 1e6, pessimism=2), pessimistic_mean(scores, pessimism=2) + 1e6)
    assert_close(pessimistic_mean(scores[[2, 0, 3, 1]], pessimism=2), pessimistic_mean(scores, pessimism=2))


def test_members_that_agree_lose_nothing():
    same = torch.full((3, 2), 0.7, dtype=torch.float64)
    for pessimism in (0, 0.5, 1e308):
        assert_close(pessimistic_mean(same, pessimism=pessimism), same[0])
    assert_close(disagreement(same), torch.zeros(2, dtype=torch.float64))
