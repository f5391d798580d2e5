"""The three estimators, by hand and by enumeration, and the controller."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import hold_kl, kl_error, kl_k1, kl_k2, kl_k3, next_kl_coef

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


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.0, 0.0),
        (12.0, 0.693147),  # ln 2
        (3.0, -0.693147),
        (60.0, 2.0),  # ln 10 = 2.30, clipped
        (0.6, -2.0),
        (0.0, -2.0),  # before the policy has moved
        (-0.1, -2.0),  # an estimate can be negative
    ],
)
def test_the_error_is_the_log_of_kl_over_target_clipped(kl, want):
    assert kl_error(kl, target=6.0) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("error", "last", "want"),
    [
        (0.0, 0.0, 0.1),  # on target: stays
        (0.5, 0.2, 0.191554),  # 0.1·exp(1.5·0.3 + 0.4·0.5)
        (0.2, 0.5, 0.069073),  # 0.1·exp(1.5·-0.3 + 0.4·0.2): it falls fast enough already
        (2.0, 2.0, 0.149182),  # the integral part counts an error of 1 at most: 0.1·exp(0.4)
        (-2.0, -2.0, 0.067032),
    ],
)
def test_beta_follows_the_error_and_its_change(error, last, want):
    assert hold_kl(0.1, error, last, even=1 / 6) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("coef", "error", "want"),
    [
        (0.25, 1.0, 0.3),  # 3·1/10
        (0.5, 1.0, 0.5),  # above already: not raised
        (0.5, -1.0, 0.335160),  # 0.5·exp(-0.4): lowered as ever
        (0.012, -1.0, 0.01),  # 1/10/10
        (0.005, -1.0, 0.005),  # below already: not lowered
        (0.005, 1.0, 0.0074591),  # 0.005·exp(0.4): raised as ever
    ],
)
def test_beta_moves_no_further_where_penalty_or_score_already_outweighs_the_other(coef, error, want):
    assert hold_kl(coef, error, error, even=0.1) == pytest.approx(want, rel=1e-5)


def test_beta_stays_while_all_scores_are_equal():
    assert hold_kl(0.1, -2.0, -2.0, even=0.0) == 0.1
    assert hold_kl(0.1, 2.0, -2.0, even=0.0) == 0.1


def test_in_the_loss_beta_has_no_bounds():
    assert hold_kl(0.5, 1.0, 1.0, even=None) == pytest.approx(0.745912, rel=1e-5)  # 0.5·exp(0.4)


@pytest.mark.parametrize("speed", [0.15, 0.4, 0.8])  # nats^½ per cycle: how fast the policy can move
@pytest.mark.parametrize("start", [0.02, 0.1, 0.5])  # β needs about 0.3
def test_the_kl_of_a_policy_that_drifts_until_beta_stops_it_is_held_within_a_quarter(speed, start):
    # The distance D = √(2·KL) grows with the score's pull, less the penalty's, β·D; the score's grows by 1 % per cycle.
    distance, coef, last, target = 0.0, start, -2.0, 5.0
    kls = []
    for cycle in range(200):
        kl, pull = distance**2 / 2, 1.01**cycle
        error = kl_error(kl, target=target)
        coef, last = (hold_kl(coef, error, last, even=pull / distance) if distance else coef), error
        force = 1 - coef * distance / pull
        distance = max(distance + speed * force / math.sqrt(1 + force**2), 0.0)
        kls.append(kl)
    assert max(kls) < 2 * target
    assert all(abs(kl / target - 1) <= 0.25 for kl in kls[60:])
