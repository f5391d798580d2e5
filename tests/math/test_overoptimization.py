"""Gao's two laws: points made of the law by hand give its numbers back."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import best_of_n_law, fit_best_of_n, fit_rl, rl_law

D = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


def test_points_on_the_law_of_best_of_n_give_its_numbers_back():
    gold = torch.tensor([0.2 + d * (0.9 - 0.1 * d) for d in D.tolist()], dtype=torch.float64)
    fit = fit_best_of_n(D, gold, start=0.2)
    assert fit == pytest.approx((0.9, 0.1, 0.2, 1.0))
    assert_close(best_of_n_law(fit, D), gold)


def test_points_on_the_law_of_rl_give_its_numbers_back():
    gold = torch.tensor([-1 + (d * (1.5 - 0.7 * math.log(d)) if d else 0) for d in D.tolist()], dtype=torch.float64)
    fit = fit_rl(D, gold, start=-1.0)
    assert fit == pytest.approx((1.5, 0.7, -1.0, 1.0))
    assert_close(rl_law(fit, D), gold)


def test_neither_law_explains_gold_that_has_nothing_to_do_with_distance():
    gold = torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    for fit in (fit_best_of_n(D, gold, start=0.0), fit_rl(D, gold, start=0.0)):
        assert fit.r_squared < 0.5


def test_least_squares_is_worked_by_hand_on_one_slope():
    # d = 1, 1, 1: the law is α - β·1 for best of n; the mean of gold is what is left over least
    d = torch.ones(3, dtype=torch.float64)
    fit = fit_best_of_n(d, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), start=0.0)
    assert fit.alpha - fit.beta == pytest.approx(1.0)
    assert fit.r_squared == pytest.approx(0.0)
