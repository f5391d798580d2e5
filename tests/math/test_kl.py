"""The three estimators, by hand and by enumeration, and the controller."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import kl_k1, kl_k2, kl_k3, next_kl_coef

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).log()


def test_estimators_of_a_token_that_became_twice_as_likely():
    # d = ln 2: k1 = 0.693147, k2 = 0.480453 / 2, k3 = 1/2 - 1 + 0.693147
    new, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert_close(kl_k1(new, ref), torch.tensor([0.693147]))
    assert_close(kl_k2(new, ref), torch.tensor([0.240227]))
    assert_close(kl_k3(new, ref), torch.tensor([0.193147]))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator):
    # Σ p·ln(p/q) = 0.5·ln 5 + 0 + 0.2·ln(1/3)
    want = 0.5 * math.log(5) - 0.2 * math.log(3)
    assert_close((POLICY.exp() * estimator(POLICY, REFERENCE)).sum().item(), want)


def test_k2_and_k3_are_never_negative_and_k1_is():
    assert (kl_k1(POLICY, REFERENCE) < 0).any()
    assert (kl_k2(POLICY, REFERENCE) >= 0).all()
    assert (kl_k3(POLICY, REFERENCE) >= 0).all()


def test_k3_of_nearly_equal_policies_does_not_drown_in_rounding():
    new = torch.tensor([-2.0, -2.0])
    assert_close(kl_k3(new, new - torch.tensor([2.0**-12, -(2.0**-12)])), torch.full((2,), 2.0**-25), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.0, 0.15),  # on target: stays
        (6.6, 0.15 * (1 + 0.1 * 512 / 10_000)),  # 10 % above
        (5.4, 0.15 * (1 - 0.1 * 512 / 10_000)),
        (60.0, 0.15 * (1 + 0.2 * 512 / 10_000)),  # far above: clipped at 20 %
        (-1.0, 0.15 * (1 - 0.2 * 512 / 10_000)),  # an estimate can be negative
    ],
)
def test_the_controller_takes_a_proportional_step_of_at_most_a_fifth_a_horizon(kl, want):
    got = next_kl_coef(0.15, kl, target=6.0, horizon=10_000, responses=512)
    assert got == pytest.approx(want, rel=1e-12)


def test_the_controller_holds_a_kl_that_falls_with_beta():
    coef = 0.01
    for _ in range(2000):  # a plant with KL = 1/β: the target 4 needs β = 1/4
        coef = next_kl_coef(coef, 1 / coef, target=4.0, horizon=10_000, responses=256)
    assert coef == pytest.approx(0.25, rel=1e-3)
