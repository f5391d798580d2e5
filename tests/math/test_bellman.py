"""The squared soft-Bellman residual: by hand, against finite differences, and its minimum by enumeration.

Every response of a small task is a row, weighted by how likely the data holds it; the policy is a table of logits and
the critic a table of values, one for each prefix. π* and V* are computed apart, from sums over all responses.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from games import Game, bandit, kl, of_responses, optimum, variable_length
from tether.math import bellman_loss

BETA = 0.5
LAMS = [0.0, 0.95, 1.0]


def test_one_response_of_two_tokens_worked_by_hand():
    # β = .5, score 2, log π/ref = .4 and -.2: r = (-.2, 2.1); V = (1, 1.5)
    # δ = (-.2 + 1.5 - 1, 2.1 - 1.5) = (.3, .6); λ = .5: A = (.3 + .5·.6, .6) = (.6, .6); L = ½(.36 + .36)/2 = .18
    logprobs, ref = torch.tensor([[-1.0, -1.2]]), torch.tensor([[-1.4, -1.0]])
    loss, residuals = bellman_loss(
        logprobs, ref, torch.tensor([[1.0, 1.5]]), torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.bool),
        kl_coef=0.5, lam=0.5, denominator=2,
    )  # fmt: skip
    assert_close(residuals, torch.tensor([[0.6, 0.6]]))
    assert_close(loss, torch.tensor(0.18))


def test_the_gradient_reaches_log_probs_and_values_worked_by_hand():
    # The same response, L = ½(A₀² + A₁²)/2, A₁ = r₁ - V₁, A₀ = r₀ + V₁ - V₀ + ½A₁, ∂r/∂log π = -.5:
    # ∂L/∂log π₀ = ½·A₀·(-.5) = -.15;  ∂L/∂log π₁ = ½(A₀·½ + A₁)·(-.5) = -.225
    # ∂L/∂V₀ = ½·A₀·(-1) = -.3;        ∂L/∂V₁ = ½(A₀·(1 - ½) + A₁·(-1)) = -.15
    logprobs = torch.tensor([[-1.0, -1.2]], requires_grad=True)
    values = torch.tensor([[1.0, 1.5]], requires_grad=True)
    loss, _ = bellman_loss(
        logprobs, torch.tensor([[-1.4, -1.0]]), values, torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.bool),
        kl_coef=0.5, lam=0.5, denominator=2,
    )  # fmt: skip
    loss.backward()
    assert_close(logprobs.grad, torch.tensor([[-0.15, -0.225]]))
    assert_close(values.grad, torch.tensor([[-0.3, -0.15]]))


@pytest.mark.parametrize("lam", LAMS)
def test_the_gradient_agrees_with_finite_differences_on_ragged_rows(lam):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, values = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]

    def loss(logprobs: Tensor, values: Tensor) -> Tensor:
        return bellman_loss(logprobs, ref, values, scores, mask, kl_coef=BETA, lam=lam, denominator=9)[0]

    torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), values.requires_grad_()))


@pytest.mark.parametrize("lam", LAMS)
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient(lam):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = []
    for junk in (0.0, math.nan, math.inf):
        logprobs, values = (
            torch.where(mask, x, junk).requires_grad_() for x in (torch.tensor(-0.7), torch.tensor(0.3))
        )
        ref = torch.where(mask, -0.9, junk)
        loss, residuals = bellman_loss(
            logprobs, ref, values, torch.tensor([1.0, -1.0]), mask, kl_coef=BETA, lam=lam, denominator=3
        )
        loss.backward()
        found.append((loss.detach(), residuals.detach(), logprobs.grad, values.grad))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_close(got, want, rtol=0, atol=0)


# ---------------------------------------------------------------- the minimum


def data_policies(g: Game) -> dict[str, Tensor]:
    """[prefixes, symbols] log-probs of who wrote the data: nobody, the reference, and somebody else."""
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(g.reference.shape, generator=generator, dtype=torch.float64)
    return {
        "uniform": torch.zeros_like(g.reference).log_softmax(-1),
        "reference": g.reference,
        "another": other.log_softmax(-1),
    }


def optimal_values(g: Game) -> Tensor:
    """[prefixes] V*(s) = β·log Σ ref(rest|s)·e^(score/β), over every response that goes through s."""
    below = torch.where(g.mask, g.reference[g.prefixes, g.actions], 0.0)
    rest = below.flip(1).cumsum(1).flip(1)  # log ref of the tokens from t on
    values = torch.full((len(g.reference),), -math.inf, dtype=torch.float64)
    for i in range(len(g.scores)):
        for t in range(int(g.mask[i].sum())):
            s = g.prefixes[i, t]
            values[s] = torch.logaddexp(values[s], rest[i, t] + g.scores[i] / BETA)
    return BETA * values


def optimal_policy(g: Game) -> Tensor:
    """[prefixes, symbols] log π*, from the probability of every response under it."""
    p = optimum(g, BETA)
    visits = torch.zeros_like(g.reference)
    weight = p[:, None].expand(g.mask.shape)
    visits.index_put_((g.prefixes[g.mask], g.actions[g.mask]), weight[g.mask], accumulate=True)
    return (visits / visits.sum(1, keepdim=True)).log()


def expected_loss(g: Game, table: Tensor, values: Tensor, data: Tensor, lam: float) -> Tensor:
    """The loss over every response, as often as the data holds it: √weight scales a row's residuals, linear in it."""
    root = of_responses(g, data).exp().sqrt()[:, None]
    new, ref, v = table[g.prefixes, g.actions], g.reference[g.prefixes, g.actions], values[g.prefixes]
    return bellman_loss(
        root * new, root * ref, root * v, root[:, 0] * g.scores, g.mask, kl_coef=BETA, lam=lam, denominator=1
    )[0]


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("writer", ["uniform", "reference", "another"])
@pytest.mark.parametrize("make", [bandit, variable_length])
def test_at_the_optimum_loss_and_gradient_are_zero_whoever_wrote_the_data(make, writer, lam):
    g = make()
    table, values = optimal_policy(g).requires_grad_(), optimal_values(g).requires_grad_()
    loss = expected_loss(g, table.log_softmax(-1), values, data_policies(g)[writer], lam)
    loss.backward()
    assert float(loss.detach()) < 1e-28
    assert table.grad is not None
    assert values.grad is not None
    assert float(table.grad.abs().max()) < 1e-13
    assert float(values.grad.abs().max()) < 1e-13


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("writer", ["uniform", "reference", "another"])
@pytest.mark.parametrize("make", [bandit, variable_length])
def test_from_whatever_data_the_minimum_is_the_optimum_with_its_values(make, writer, lam):
    g = make()
    logits = g.reference.clone().requires_grad_()
    values = torch.zeros(len(g.reference), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [logits, values], lr=1, max_iter=4000, tolerance_grad=1e-13, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        descent.zero_grad()
        loss = expected_loss(g, logits.log_softmax(-1), values, data_policies(g)[writer], lam)
        loss.backward()
        return loss

    descent.step(closure)
    learned = of_responses(g, logits.detach().log_softmax(-1)).exp()
    assert kl(learned, optimum(g, BETA)) <= 1e-6
    assert float((values.detach() - optimal_values(g)).abs().max()) <= 1e-6
