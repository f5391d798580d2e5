"""Preference losses: worked by hand, and their optima, exactly, by enumerating every pair of a bandit's eight answers.

The bandit is E1 of test_exact: ref = softmax(-0.3k), score sin k. Pairs are drawn from the reference and labeled
P = σ(Δscore); single answers are called good with P = σ(score). All of it is float64, and nothing is random.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import (
    ipo_loss,
    kto_loss,
    kto_point,
    log_odds,
    noisy_targets,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
    sum_answers,
    unpaired_loss,
)

K = torch.arange(8, dtype=torch.float64)
REF, SCORE = (-0.3 * K).log_softmax(0), K.sin()
FIRST, SECOND = (index.flatten() for index in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
WEIGHTS, P = (REF[FIRST] + REF[SECOND]).exp(), torch.sigmoid(SCORE[FIRST] - SCORE[SECOND])
FLIPPED = 0.9 * P + 0.1 * (1 - P)  # a tenth of the labels


def minimize(loss, size=8):
    """The parameters at the loss's minimum; the first eight are the policy's logits."""
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x[:8].log_softmax(0), x)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return x.detach()[:8].log_softmax(0), x.detach()


def optimum_of(loss, targets, **knobs):
    """Of a loss of pairs, which sees log-ratios."""
    return minimize(lambda log_p, _: loss((log_p - REF)[FIRST], (log_p - REF)[SECOND], targets, WEIGHTS,
                                          denominator=1.0, **knobs))[0]  # fmt: skip


def kl_to_best(log_p, beta):
    return float((log_p.exp() * (log_p - (REF + SCORE / beta).log_softmax(0))).sum())


def noisy(targets, *, smoothing=0.0, flipped=0.0):
    return noisy_targets(targets, smoothing=smoothing, flipped=flipped)


# ---------------------------------------------------------------- where each comes to rest

PAIRS = {  # loss, targets, then for β = 1 and β = .5: E[score], KL to π* (NEIGHBOURS: found independently)
    "sigmoid": (sigmoid_loss, P, {1.0: (0.5221404, 0), 0.5: (0.7007796, 0)}),
    "sigmoid, a tenth flipped": (sigmoid_loss, FLIPPED, {1.0: (0.462023, 0.00728), 0.5: (0.630828, 0.01729)}),
    "smoothing": (sigmoid_loss, noisy(P, smoothing=0.1), {1.0: (0.462023, 0.00728), 0.5: (0.630828, 0.01729)}),
    "flipped, a tenth flipped": (sigmoid_loss, noisy(FLIPPED, flipped=0.1), {1.0: (0.5221404, 0), 0.5: (0.7007796, 0)}),
    "ipo": (ipo_loss, P, {1.0: (0.296747, 0.0930), 0.5: (0.368514, 0.2971)}),
}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", PAIRS)
def test_a_loss_of_pairs_rests_where_the_table_says(name, beta):
    loss, targets, wanted = PAIRS[name]
    log_p = optimum_of(loss, targets, beta=beta)
    score, kl = wanted[beta]
    assert float((log_p.exp() * SCORE).sum()) == pytest.approx(score, abs=1e-6)
    assert kl_to_best(log_p, beta) == pytest.approx(kl, abs=1e-9 if kl == 0 else 5e-5)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ipo_rests_at_the_reference_tilted_by_how_often_an_answer_wins(beta):
    wins = (REF.exp() * torch.sigmoid(SCORE[:, None] - SCORE)).sum(1)
    assert_close(optimum_of(ipo_loss, P, beta=beta), (REF + wins / beta).log_softmax(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("beta", "kl"), [(1.0, 0.2173), (0.5, 0.1924)])
def test_simpo_rests_at_the_scores_alone_whatever_the_reference(beta, kl):
    log_p, _ = minimize(lambda log_p, _: simpo_loss(log_p[FIRST], log_p[SECOND], P, WEIGHTS, beta=beta, gamma=0.0,
                                                    denominator=1.0))  # fmt: skip
    assert_close(log_p, (SCORE / beta).log_softmax(0), atol=1e-6, rtol=0)
    assert kl_to_best(log_p, beta) == pytest.approx(kl, abs=1e-4)


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("bar", [0.0, 0.7])
def test_unpaired_labels_lead_to_the_best_policy_and_its_value_less_the_bar_of_the_labelers(beta, bar):
    good = torch.sigmoid(SCORE - bar)
    log_p, x = minimize(
        lambda log_p, x: unpaired_loss(log_p - REF, x[8:].expand(8), good, REF.exp(), beta=beta, denominator=1.0), 9
    )
    assert_close(log_p, (REF + SCORE / beta).log_softmax(0), atol=1e-6, rtol=0)
    assert x[8].item() == pytest.approx(float(beta * (REF + SCORE / beta).logsumexp(0)) - bar, abs=1e-6)


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_kto_leaves_what_is_good_more_often_than_not_whatever_the_strengths(strength):
    good = torch.sigmoid(strength * SCORE)
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(2000):
        log_p = x.log_softmax(0)
        kl = (log_p.exp() * (log_p - REF)).sum().detach()
        optimizer.zero_grad()
        kto_loss(log_p - REF, kl, good, REF.exp(), beta=0.5, denominator=1.0).backward()
        optimizer.step()
    p = x.detach().softmax(0)
    assert p[SCORE < 0].sum() < 1e-4
    assert kl_to_best(p.log(), 0.5) > 0.1  # arm 3, whose score is 0.14, nearly as arm 2, or nearly gone: never π*


def test_labels_without_noise_have_no_optimum_under_the_sigmoid_and_one_under_ipo():
    hard = (SCORE[FIRST] > SCORE[SECOND]).double() + 0.5 * (FIRST == SECOND)
    assert optimum_of(sigmoid_loss, hard, beta=0.5).exp().max() > 0.999
    assert optimum_of(ipo_loss, hard, beta=0.5).exp().max() < 0.8


# ---------------------------------------------------------------- by hand

ONE = torch.ones(1)


def test_before_the_first_step_the_loss_is_that_of_knowing_nothing():
    zero = torch.zeros(1)
    assert_close(sigmoid_loss(zero, zero, ONE, ONE, beta=0.1, denominator=1.0), torch.tensor(math.log(2)))
    assert_close(unpaired_loss(zero, zero, ONE, ONE, beta=0.1, denominator=1.0), torch.tensor(math.log(2)))
    assert_close(ipo_loss(zero, zero, ONE, ONE, beta=0.1, denominator=1.0), torch.tensor(25.0))  # 1/(4·0.01)
    assert_close(kto_loss(zero, torch.tensor(0.0), ONE, ONE, beta=0.1, denominator=1.0), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("target", "want"),
    [(1.0, math.log1p(math.exp(-1))), (0.0, math.log1p(math.e)), (0.5, math.log1p(math.e) - 0.5)],
    ids=["won", "lost", "a tie"],
)
def test_the_sigmoid_of_a_lead_of_one_worked_by_hand(target, want):
    # β·h = 0.5·(3 - 1) = 1; log(1+e) = 1 + log(1+1/e), so a tie is log(1+e) - 1/2
    got = sigmoid_loss(3 * ONE, ONE, target * ONE, ONE, beta=0.5, denominator=1.0)
    assert got.item() == pytest.approx(want)


def test_simpo_asks_for_a_lead_of_gamma_worked_by_hand():
    # β·d - γ = 2·(−1 + 2) − 0.5 = 1.5
    got = simpo_loss(-ONE, -2 * ONE, ONE, ONE, beta=2.0, gamma=0.5, denominator=1.0)
    assert got.item() == pytest.approx(math.log1p(math.exp(-1.5)))


def test_orpo_by_hand_and_finite_where_an_answer_is_certain():
    # p = 1/2 has odds 1, p = 1/5 odds 1/4: log σ(log 4) = log(4/5)
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
    assert orpo_loss(chosen, rejected, ONE, ONE, denominator=1.0).item() == pytest.approx(-math.log(0.8))
    for certain in (0.0, -1e-30, -1e-4, -90.0):
        m = torch.tensor([certain], requires_grad=True)
        loss = orpo_loss(m, rejected, ONE, ONE, denominator=1.0) + orpo_loss(rejected, m, ONE, ONE, denominator=1.0)
        loss.backward()
        assert loss.isfinite()
        assert m.grad.isfinite().all()


@pytest.mark.parametrize("p", [1e-30, 1e-4, 0.3, 0.49, 0.51, 0.9, 0.9999])
def test_log_odds_are_those_of_the_definition_with_their_gradient(p):
    m = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    odds = log_odds(m)
    odds.sum().backward()
    assert odds.item() == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-9)
    assert m.grad.item() == pytest.approx(1 / (1 - p), rel=1e-9)  # d/dm [m - log(1 - e^m)] = 1 / (1 - p)


def test_kto_by_hand():
    # u = 0.5·(3 - 1) = 1: good 1 - σ(1), bad 1 - σ(-1)
    for target, want in ((1.0, 1 / (1 + math.e)), (0.0, math.e / (1 + math.e))):
        got = kto_loss(3 * ONE, torch.tensor(1.0), target * ONE, ONE, beta=0.5, denominator=1.0)
        assert got.item() == pytest.approx(want)
    assert kto_point(torch.tensor([1.0, 2.0])).item() == 1.5
    assert kto_point(torch.tensor([-1.0, -2.0])).item() == 0  # a KL is not negative


def test_targets_of_noisy_labels_by_hand():
    p = torch.tensor([1.0, 0.5, 0.0, 0.8])
    assert_close(noisy(p, smoothing=0.1), torch.tensor([0.9, 0.5, 0.1, 0.74]))  # .8·.9 + .2·.1
    assert_close(noisy(p, flipped=0.1), torch.tensor([0.9 / 0.8, 0.5, -0.1 / 0.8, 0.7 / 0.8]))


def test_a_pair_of_weight_2_counts_as_two_pairs():
    chosen, rejected, targets = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.3])
    for loss, knobs in ((sigmoid_loss, {}), (ipo_loss, {}), (simpo_loss, {"gamma": 0.3})):
        weighted = loss(chosen, rejected, targets, torch.tensor([2.0, 1.0]), beta=0.4, denominator=3.0, **knobs)
        index = torch.tensor([0, 0, 1])
        thrice = loss(chosen[index], rejected[index], targets[index], torch.ones(3), beta=0.4, denominator=3.0, **knobs)
        assert_close(weighted, thrice)


def test_what_does_not_count_may_be_anything_and_has_no_gradient():
    x = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("-inf"), float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(sum_answers(x, mask, average=False).detach(), torch.tensor([3.0, 3.0]))
    means = sum_answers(x, mask, average=True)
    assert_close(means.detach(), torch.tensor([1.5, 3.0]))
    means.sum().backward()
    assert_close(x.grad, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
