"""The pieces together must have the right optimum, exactly: every response is enumerated, so nothing is sampled.

Maximizing E[score] - β·KL(π‖ref) over all policies gives π*(y) ∝ ref(y)·e^(score(y)/β). Here the policy is a table of
logits for every prefix, a step is the exact expected gradient of the loss under test, and what it comes to rest at is
compared with π*. Each response is a row, its advantages weighted by its probability.

Nothing here is random, and all of it is float64: on two CPU paths the steps end within 1e-14 of optima where 1e-9 is
asked, and within 1e-9 of the reference where 1e-6 is asked.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from games import Game, bandit, kl, of_responses, optimum, sparse, variable_length
from tether.math import (
    cispo_loss,
    clipped_policy_loss,
    entropy_mean,
    gae,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
    masked_sum,
    place_rewards,
    token_logprobs,
)

Loss = Callable[[Game, Tensor, Tensor, Tensor, Tensor], Tensor]


def rest(g: Game, loss: Loss, *, rate: float, steps: int, start: Tensor | None = None) -> Tensor:
    """[B] probabilities where steps down `loss(game, new, entropy, ref, probability)` come to rest.

    A step is preconditioned by each token's probability (the natural gradient of a softmax), for speed.
    """
    logits = (g.reference if start is None else start).clone().requires_grad_()
    symbols = logits.shape[1]
    for _ in range(steps):
        # as a language model would: hidden state = the prefix's logits, head = identity
        new, entropy = token_logprobs(logits[g.prefixes.flatten()], torch.eye(symbols).double(), g.actions.flatten())
        new, entropy = new.view(g.mask.shape), entropy.view(g.mask.shape)
        probability = torch.where(g.mask, new.detach(), 0.0).sum(1).exp()
        ref = g.reference[g.prefixes, g.actions]
        (gradient,) = torch.autograd.grad(loss(g, new, entropy, ref, probability), logits)
        visits = torch.zeros(len(logits)).double()
        visits.index_add_(0, g.prefixes[g.mask], probability[:, None].expand(g.mask.shape)[g.mask])
        with torch.no_grad():
            logits -= rate * gradient / (visits[:, None] * logits.softmax(-1))
    return of_responses(g, logits.detach().log_softmax(-1)).exp()


def policy_loss(g: Game, new: Tensor, rewards: Tensor, probability: Tensor) -> Tensor:
    """Expected policy loss for these rewards, with the critic that is exact for them and λ = 0.5."""
    _, to_go = gae(rewards, torch.zeros_like(rewards), g.mask, gamma=1.0, lam=1.0)
    weight = probability[:, None].expand(g.mask.shape)[g.mask]
    total, visits = (torch.zeros(len(g.reference)).double() for _ in range(2))
    total.index_add_(0, g.prefixes[g.mask], weight * to_go[g.mask])
    visits.index_add_(0, g.prefixes[g.mask], weight)
    advantages, _ = gae(rewards, (total / visits)[g.prefixes], g.mask, gamma=1.0, lam=0.5)
    advantages = advantages * probability[:, None]
    return clipped_policy_loss(new, new.detach(), advantages, g.mask, clip=0.2, denominator=1)[0]


def kl_in_reward(beta: float, entropy_coef: float = 0.0) -> Loss:
    def loss(g: Game, new: Tensor, entropy: Tensor, ref: Tensor, probability: Tensor) -> Tensor:
        rewards = place_rewards(g.scores, new.detach(), ref, g.mask, kl_coef=beta)
        bonus = entropy_mean(entropy * probability[:, None], g.mask, denominator=1)
        return policy_loss(g, new, rewards, probability) - entropy_coef * bonus

    return loss


def kl_in_loss(beta: float, estimator: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(g: Game, new: Tensor, entropy: Tensor, ref: Tensor, probability: Tensor) -> Tensor:
        rewards = place_rewards(g.scores, new.detach(), ref, g.mask, kl_coef=0.0)
        penalty = masked_sum(probability[:, None] * estimator(new, ref), g.mask)
        return policy_loss(g, new, rewards, probability) + beta * penalty

    return loss


GAMES = {"bandit": bandit, "sparse": sparse, "variable length": variable_length}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("make", GAMES.values(), ids=GAMES)
def test_with_k1_in_the_reward_the_resting_point_is_the_optimum(make, beta):
    g = make()
    assert kl(rest(g, kl_in_reward(beta), rate=0.5 / beta, steps=60), optimum(g, beta)) < 1e-9


@pytest.mark.parametrize(
    ("make", "beta", "score", "divergence"),
    [(bandit, 1.0, 0.522140, 0.140748), (bandit, 0.5, 0.700780, 0.399364), (sparse, 0.5, 0.639232, 0.473890)],
)
def test_score_and_kl_at_rest_are_the_known_figures(make, beta, score, divergence):
    g = make()
    policy = rest(g, kl_in_reward(beta), rate=0.5 / beta, steps=60)
    assert float((policy * g.scores).sum()) == pytest.approx(score, abs=1e-6)
    assert kl(policy, of_responses(g, g.reference).exp()) == pytest.approx(divergence, abs=1e-6)


def test_an_entropy_bonus_tempers_the_bandits_optimum():
    # π* ∝ (ref^β · e^score)^(1/(β + c2))
    g, beta, entropy_coef = bandit(), 0.5, 0.3
    want = torch.softmax((beta * g.reference[0] + g.scores) / (beta + entropy_coef), 0)
    assert_close(rest(g, kl_in_reward(beta, entropy_coef), rate=1.0, steps=40), want)


def test_in_the_reward_only_k1_returns_to_the_reference_and_k2_and_k3_drift_away():
    g = bandit()
    start = g.reference + 0.2 * torch.cos(3 * torch.arange(8).double())
    reference = g.reference[0].exp()
    before = kl(start.softmax(-1)[0], reference)

    def zero_score_with(estimator):
        def loss(g, new, entropy, ref, probability):
            return policy_loss(g, new, -estimator(new.detach(), ref), probability)

        return rest(g, loss, rate=0.1, steps=80, start=start)

    assert kl(zero_score_with(kl_k1), reference) < 1e-6
    assert kl(zero_score_with(kl_k2), reference) > 2 * before
    assert kl(zero_score_with(kl_k3), reference) > 2 * before


def test_in_the_loss_k2_rests_at_the_bandits_optimum_and_k3_elsewhere():
    g = bandit()
    for beta, gap in [(1.0, 0.0047), (0.5, 0.0306)]:
        assert kl(rest(g, kl_in_loss(beta, kl_k2), rate=0.5 / beta, steps=60), optimum(g, beta)) < 1e-9
        resting = rest(g, kl_in_loss(beta, kl_k3), rate=0.5, steps=150)
        assert kl(resting, optimum(g, beta)) == pytest.approx(gap, abs=5e-5)


@pytest.mark.parametrize(("estimator", "gap"), [(kl_k2, 0.260), (kl_k3, 0.214)])
def test_in_the_loss_neither_k2_nor_k3_sees_the_kl_of_the_tokens_to_come(estimator, gap):
    g = variable_length()
    resting = rest(g, kl_in_loss(0.5, estimator), rate=0.5, steps=60)
    assert kl(resting, optimum(g, 0.5)) == pytest.approx(gap, abs=1e-3)


def test_whitening_the_rewards_would_be_a_bias_on_length():
    # r / std + mean · (1 - 1/std): the second term is one and the same for every token, so length is paid or fined
    g = variable_length()

    def loss(g, new, entropy, ref, probability):
        rewards = place_rewards(g.scores, new.detach(), ref, g.mask, kl_coef=0.5)
        weight = torch.where(g.mask, probability[:, None], 0.0)
        weight /= weight.sum()
        mean = (weight * rewards).sum()
        std = (weight * (rewards - mean) ** 2).sum().sqrt()
        return policy_loss(g, new, torch.where(g.mask, (rewards - mean) / std + mean, 0.0), probability)

    resting, best, lengths = rest(g, loss, rate=0.2, steps=100), optimum(g, 0.5), g.mask.sum(1)
    assert kl(resting, best) == pytest.approx(0.095, abs=1e-3)
    assert float((best * lengths).sum()) == pytest.approx(1.67, abs=5e-3)
    assert float((resting * lengths).sum()) == pytest.approx(1.22, abs=5e-3)


def expected_gradients() -> tuple[Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor], Tensor, Tensor]:
    """Eight tokens that are the policy (1/8, 1/8, 1/4, 1/2): the mean of a loss over them is its expectation."""
    logits = torch.tensor([0.125, 0.125, 0.25, 0.5]).double().log().requires_grad_()
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    tokens = torch.tensor([[0, 1, 2, 2, 3, 3, 3, 3]])

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        new = logits.log_softmax(-1)[tokens]
        return torch.autograd.grad(loss(new, reference[tokens]), logits)[0]

    return gradient, logits, reference


def test_k1_in_the_loss_has_no_gradient_on_average():
    gradient, _, _ = expected_gradients()
    assert gradient(lambda new, ref: kl_k1(new, ref).mean()).abs().max() < 1e-15


def test_the_kl_loss_has_the_gradient_of_the_reverse_kl():
    gradient, logits, reference = expected_gradients()
    log_p = logits.log_softmax(-1)
    (want,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits)
    got = gradient(lambda new, ref: kl_loss(new, ref, torch.ones_like(new, dtype=torch.bool), denominator=8))
    assert_close(got, want)


def test_k3_in_the_loss_has_the_gradient_of_the_kl_from_the_reference():
    gradient, logits, reference = expected_gradients()
    (want,) = torch.autograd.grad((reference.exp() * (reference - logits.log_softmax(-1))).sum(), logits)
    assert_close(gradient(lambda new, ref: kl_k3(new, ref).mean()), want)


def g_of(game: Game, table: Tensor, beta: float) -> Tensor:
    """[B] score - β·log(π/ref) of every response."""
    return game.scores - beta * (of_responses(game, table) - of_responses(game, game.reference))


@pytest.mark.parametrize("make", GAMES.values(), ids=GAMES)
def test_at_the_optimum_the_advantage_in_a_group_is_zero_for_every_sample(make):
    # log π* = log ref + score/β - log Z, so every g is β·log Z
    e = make()
    log_ratio = e.scores / 0.5 - torch.logsumexp(of_responses(e, e.reference) + e.scores / 0.5, 0)
    g = e.scores - 0.5 * log_ratio
    everyone = group_advantages(g, responses_per_prompt=len(g))
    assert everyone.abs().max() < 1e-12


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("surrogate", [clipped_policy_loss, cispo_loss])
def test_the_expected_gradient_with_a_group_baseline_is_that_of_the_objective(k, surrogate):
    # every group of k responses of a bandit, weighted by its probability
    e, beta = bandit(), 0.5
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 8, generator=generator, dtype=torch.float64).requires_grad_()
    log_p = logits.log_softmax(-1)[0]
    (want,) = torch.autograd.grad(
        (log_p.exp() * e.scores).sum() - beta * (log_p.exp() * (log_p - e.reference[0])).sum(),
        logits,
        retain_graph=True,
    )
    groups = torch.tensor(list(itertools.product(range(8), repeat=k)))
    g = g_of(e, logits.detach().log_softmax(-1), beta)
    advantages = group_advantages(g[groups].flatten(), responses_per_prompt=k).view(groups.shape)
    probability = log_p.detach()[groups].sum(1).exp()
    new = log_p[groups]
    loss, _ = surrogate(
        new, new.detach(), advantages * probability[:, None], torch.ones_like(new, dtype=torch.bool),
        clip=(0.2, 0.2), denominator=k,
    )  # fmt: skip
    (got,) = torch.autograd.grad(-loss, logits)
    assert_close(got, want, rtol=0, atol=1e-14)
