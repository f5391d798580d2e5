"""Implicit Q-learning: each loss by hand, its fixed point by enumeration, and what is sampled from.

In the fixed point every response of a small task is a row, weighted by how likely the data holds it; V and Q are
tables.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from games import Game, kl, of_responses, optimum, variable_length
from tether.math import expectile_loss, ilql_logits, nll_loss, q_loss, q_targets

BETA = 0.5


def newton(loss, x: Tensor) -> Tensor:
    """One step on a loss that is a parabola in each number of `x` apart."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), x)
    return (x - gradient / curvature).detach()


@pytest.mark.parametrize(("tau", "value"), [(0.5, 0.25), (0.7, 0.4375), (0.9, 0.75), (0.99, 0.9706)])
def test_v_is_the_expectile_of_a_coin(tau, value):
    # Q is 1 in one row of four, else 0: V = τp / (τp + (1-τ)(1-p)), p = 1/4
    q, mask = torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(4, 1, dtype=torch.bool)
    v = torch.tensor(0.5)
    for _ in range(5):
        v = newton(lambda v: expectile_loss(v.expand(4, 1), q, mask, tau=tau, denominator=4), v)
    assert v.item() == pytest.approx(value, abs=5e-5)


def test_the_targets_of_q_worked_by_hand():
    # γ = .9; three tokens, score 2: .9·5, .9·7, 2; a single token, score -1: -1, whatever V would be beyond it
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[3.0, 5.0, 7.0], [4.0, math.nan, math.inf]], requires_grad=True)
    targets = q_targets(torch.tensor([2.0, -1.0]), values, mask, gamma=0.9)
    assert_close(targets, torch.tensor([[4.5, 6.3, 2.0], [-1.0, 0.0, 0.0]]))
    assert not targets.requires_grad


def test_the_losses_and_their_gradients_worked_by_hand():
    # Q - target = (1, -2): (1 + 4)/2 = 2.5, ∂ = 2·(1, -2)/2
    # Q̄ - V = (2, -1), τ = .8: (.8·4 + .2·1)/2 = 1.7, ∂V = -2·(.8·2, .2·(-1))/2 = (-1.6, .2)
    mask, q = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3.0, 1.0]], requires_grad=True)
    targets = torch.tensor([[2.0, 3.0]], requires_grad=True)
    loss = q_loss(q, targets, mask, denominator=2)
    assert_close(loss, torch.tensor(2.5))
    loss.backward()
    assert_close(q.grad, torch.tensor([[1.0, -2.0]]))
    assert targets.grad is None
    q.grad, values = None, torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = expectile_loss(values, q, mask, tau=0.8, denominator=2)
    assert_close(loss, torch.tensor(1.7))
    loss.backward()
    assert_close(values.grad, torch.tensor([[-1.6, 0.2]]))
    assert q.grad is None


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient(junk):
    mask = torch.tensor([[True, True], [True, False]])
    found = []
    for padding in (0.0, junk):
        q, v = (torch.where(mask, x, torch.tensor(padding)).requires_grad_() for x in (0.5, torch.tensor(-0.7)))
        targets = q_targets(torch.tensor([1.0, 2.0]), v, mask, gamma=0.9)
        loss = q_loss(q, targets, mask, denominator=3) + expectile_loss(v, q, mask, tau=0.7, denominator=3)
        loss.backward()
        found.append((loss.detach(), q.grad, v.grad))
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got, want, rtol=0, atol=0)


# ---------------------------------------------------------------- what is sampled from


def test_the_likeliest_tokens_shifted_by_q_worked_by_hand():
    # p = (.5, .3, .2), Q of the two likeliest (1, 2), strength ln 2: .5·2 : .3·4 = 1 : 1.2
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log() + 7  # a normalizer that nobody needs
    got = ilql_logits(logits, torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 0]]), strength=math.log(2)).softmax(-1)
    assert_close(got, torch.tensor([[1 / 2.2, 1.2 / 2.2, 0.0]]))


def test_strength_0_is_the_language_model():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ilql_logits(logits, torch.randn(4, 9), None, strength=0.0), logits)


def test_v_in_the_exponent_changes_nothing():
    logits, q, v = torch.randn(4, 9), torch.randn(4, 9), torch.randn(4, 1)
    with_v = ilql_logits(logits, q - v, None, strength=3.0).softmax(-1)
    assert_close(ilql_logits(logits, q, None, strength=3.0).softmax(-1), with_v)


def soft_optimal_q(g: Game) -> Tensor:
    """[prefixes, symbols] Q*(s, a) = β·log Σ ref(rest|s, a)·e^(score/β), over every response that begins so."""
    below = torch.where(g.mask, g.reference[g.prefixes, g.actions], 0.0)
    after = below.flip(1).cumsum(1).flip(1) - below  # log ref of the tokens after t
    q = torch.full_like(g.reference, -math.inf)
    for i in range(len(g.scores)):
        for t in range(int(g.mask[i].sum())):
            here = g.prefixes[i, t], g.actions[i, t]
            q[here] = torch.logaddexp(q[here], after[i, t] + g.scores[i] / BETA)
    return BETA * q


def test_with_the_soft_optimal_q_strength_1_over_beta_samples_from_ppos_optimum():
    g = variable_length()
    steered = ilql_logits(g.reference, soft_optimal_q(g), None, strength=1 / BETA).log_softmax(-1)
    assert_close(of_responses(g, steered).exp(), optimum(g, BETA), rtol=1e-12, atol=1e-14)


def fixed_point(g: Game, tau: float) -> tuple[Tensor, Tensor]:
    """(Q [prefixes, symbols], V [prefixes]) where all losses rest, on data of the reference: γ = 1, no CQL.

    A row counts as often as the data holds it: the root of that scales its residuals.
    """
    root = of_responses(g, g.reference).exp().sqrt()[:, None]
    q, v = torch.zeros_like(g.reference), torch.zeros(len(g.reference), dtype=torch.float64)
    for _ in range(g.mask.shape[1]):  # what the end is worth travels back a token at a time
        targets = q_targets(g.scores, v[g.prefixes], g.mask, gamma=1.0)
        q = newton(lambda q: q_loss(root * q[g.prefixes, g.actions], root * targets, g.mask, denominator=1), q)  # noqa: B023
        for _ in range(8):
            v = newton(
                lambda v: expectile_loss(
                    root * v[g.prefixes], root * q[g.prefixes, g.actions], g.mask, tau=tau, denominator=1  # noqa: B023
                ),
                v,
            )  # fmt: skip
    return q, v


@pytest.mark.parametrize(
    ("tau", "to_optimum"), [(0.5, 0.078), (0.7, 0.023), (0.8, 0.0047), (0.9, 0.084), (0.99, 0.739)]
)
def test_the_fixed_point_is_near_ppos_optimum_for_some_tau_and_far_for_others(tau, to_optimum):
    g = variable_length()
    q, v = fixed_point(g, tau)
    # it rests: V after a token is its Q, and V the expectile of Q under the data, each found apart
    for i in range(len(g.scores)):
        last = int(g.mask[i].sum()) - 1
        assert float(q[g.prefixes[i, last], g.actions[i, last]]) == pytest.approx(float(g.scores[i]))
    below, p = q < v[:, None], g.reference.exp()
    balance = (p * torch.where(below, 1 - tau, tau) * (q - v[:, None])).sum(1)
    assert_close(balance, torch.zeros_like(balance), atol=1e-12, rtol=0)
    steered = ilql_logits(g.reference, q, None, strength=1 / BETA).log_softmax(-1)
    assert kl(of_responses(g, steered).exp(), optimum(g, BETA)) == pytest.approx(to_optimum, abs=6e-4)


def test_the_language_model_learns_who_wrote_the_data():
    # cross-entropy on data of the reference has its minimum there: what the fixed point is decoded with
    g = variable_length()
    weight = of_responses(g, g.reference).exp()[:, None]
    logits = g.reference.clone().requires_grad_()
    table = logits.log_softmax(-1)
    nll_loss(weight * table[g.prefixes, g.actions], g.mask, denominator=1).backward()
    assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)
