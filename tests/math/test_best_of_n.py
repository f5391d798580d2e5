"""Best of n against the figures of the exact tasks, found by enumerating every sample of n or N responses."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tether.math import (
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_probabilities,
    best_of_n_score,
)


def bandit() -> tuple[Tensor, Tensor]:
    """E1: (scores, probabilities) of eight arms, score sin k, reference softmax(-0.3k); lowest score first."""
    scores = torch.sin(torch.arange(8).double())
    order = scores.argsort()
    return scores[order], (-0.3 * torch.arange(8).double()).softmax(0)[order]


def sparse() -> tuple[Tensor, Tensor]:
    """E2: six of three symbols, uniform, score 1 if as many 0 as 1: two levels, tied many times."""
    good = sum(y.count(0) == y.count(1) for y in itertools.product(range(3), repeat=6)) / 3**6
    return torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1 - good, good], dtype=torch.float64)


GOLDEN = [
    (bandit, 2, 0.548073, 0.184356),
    (bandit, 4, 0.771444, 0.607873),
    (bandit, 8, 0.878396, 1.125224),
    (bandit, 16, 0.904580, 1.589597),
    (sparse, 2, 0.349422, 0.066822),
    (sparse, 4, 0.576748, 0.357204),
    (sparse, 8, 0.820858, 0.917014),
    (sparse, 16, 0.967908, 1.455147),
]


@pytest.mark.parametrize(("task", "n", "score", "kl"), GOLDEN)
def test_score_and_kl_of_known_probabilities_are_the_known_figures(task, n, score, kl):
    scores, probabilities = task()
    assert float(best_of_n_probabilities(probabilities, n=n) @ scores) == pytest.approx(score, abs=1e-6)
    assert float(best_of_n_kl(probabilities, n=n)) == pytest.approx(kl, abs=1e-6)
    assert kl < best_of_n_kl_bound(n)


def test_the_kl_is_that_of_every_response_when_ties_are_broken_at_random():
    # nine responses one by one, three of them good: a draw keeps each of its best with equal chance
    scores = [float(y.count(0) == y.count(1)) for y in itertools.product(range(3), repeat=2)]
    n, kept = 3, dict.fromkeys(range(9), 0.0)
    for draw in itertools.product(range(9), repeat=n):
        best = [i for i in draw if scores[i] == max(scores[j] for j in draw)]
        for i in best:
            kept[i] += 9**-n / len(best)
    want = sum(q * math.log(q * 9) for q in kept.values())
    good = sum(scores) / 9
    got = best_of_n_kl(torch.tensor([1 - good, good], dtype=torch.float64), n=n)
    assert float(got) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("samples", "n"), [(2, 2), (3, 2), (4, 4), (5, 4)])
def test_the_estimate_of_the_score_is_unbiased_over_every_sample_of_the_bandit(samples, n):
    scores, probabilities = bandit()
    drawn = torch.tensor(list(itertools.product(range(8), repeat=samples)))
    mean = probabilities[drawn].prod(1) @ best_of_n_score(scores[drawn], n=n)
    want = next(score for task, k, score, _ in GOLDEN if task is bandit and k == n)
    assert float(mean) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("samples", "n"), [(8, 8), (12, 8), (16, 16), (20, 16)])
def test_the_estimate_of_the_score_is_unbiased_over_every_sample_of_the_tied_task(samples, n):
    _, (_, good) = sparse()
    ones = torch.arange(samples + 1)  # a sample of two levels is its number of ones
    drawn = (torch.arange(samples) < ones[:, None]).double()
    chance = torch.distributions.Binomial(samples, good).log_prob(ones.double()).exp()
    want = next(score for task, k, score, _ in GOLDEN if task is sparse and k == n)
    assert float(chance @ best_of_n_score(drawn, n=n)) == pytest.approx(want, abs=1e-6)


def test_the_score_of_two_of_four_by_hand():
    # pairs of 1, 2, 4, 8: the best is 2, 4, 8, 4, 8, 8, whose mean is 34/6; of one it is the mean, of four the best
    scores = torch.tensor([[4.0, 1.0, 8.0, 2.0]])
    assert [float(best_of_n_score(scores, n=n)) for n in (1, 2, 4)] == pytest.approx([15 / 4, 34 / 6, 8])


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_where_no_two_samples_score_alike_the_estimate_of_the_kl_is_the_bound(n):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 8, generator=generator)
    want = [math.log(n) - (n - 1) / n] * 3
    assert best_of_n_kl_estimate(scores, n=n).tolist() == pytest.approx(want, abs=1e-12)


def test_the_estimate_of_the_kl_is_the_exact_one_where_the_sample_has_the_true_shares():
    # 1/4 at level 0 and 3/4 at level 1, as in the sample: n = 2 gives 1/16 and 15/16
    want = 1 / 16 * math.log(1 / 4) + 15 / 16 * math.log(5 / 4)
    scores = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]])
    assert float(best_of_n_kl_estimate(scores, n=2)) == pytest.approx(want, abs=1e-12)


def test_where_all_samples_score_alike_best_of_n_is_the_model_itself():
    assert best_of_n_kl_estimate(torch.ones(2, 4), n=4).tolist() == [0.0, 0.0]


def test_a_level_too_rare_for_float64_adds_nothing():
    # (1/64)^200 is 0 in float64: all of best of n is the other level
    known = torch.tensor([1 / 64, 63 / 64], dtype=torch.float64)
    assert float(best_of_n_kl(known, n=200)) == pytest.approx(math.log(64 / 63), abs=1e-12)
    scores = torch.tensor([[0.0] * 4 + [1.0] * 252])
    assert float(best_of_n_kl_estimate(scores, n=200)) == pytest.approx(math.log(64 / 63), abs=1e-12)


@pytest.mark.parametrize("samples", [3, 7, 24])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_kl_of_samples_that_all_differ_is_the_bound_whatever_their_number(samples, n):
    # log n - (n-1)/n by hand; 1/3, 1/7 and 1/24 are no binary fractions, so levels do not end at 0 unless counted
    bound = {1: 0.0, 2: 0.193147, 3: 0.431946}[n]
    scores = torch.arange(float(samples))[None]
    assert best_of_n_kl_estimate(scores, n=n).item() == pytest.approx(bound, abs=1e-6)


def test_gold_of_the_chosen_ones_is_the_mean_over_every_choice():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.1], [5.0, 4.0, 3.0, 2.0, 1.0]])
    gold = torch.tensor([[1.0, 7.0, -2.0, 0.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    for n in range(1, 6):
        want = [
            sum(max((s[i], g[i]) for i in chosen)[1] for chosen in itertools.combinations(range(5), n))
            / math.comb(5, n)
            for s, g in zip(scores.tolist(), gold.tolist(), strict=True)
        ]
        assert best_of_n_score(scores, n=n, values=gold).tolist() == pytest.approx(want)
