"""What follows from an imperfect judge: probabilities without its liking for a place, and the rate behind them."""

import math

import numpy as np
import pytest

from tether.statistics import debiased_probability, rogan_gladen, vote_probability


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_both_orders_undo_a_bias_that_adds_to_the_logit():
    # q = 1, bias 2: p_ab = σ(1 + 2), p_ba = σ(-1 + 2); T = σ(1) = .7311, where averaging gives (σ(3) + 1 - σ(1)) / 2
    assert debiased_probability(sigmoid(3), sigmoid(1)) == pytest.approx(0.7310586, abs=1e-7)
    assert (sigmoid(3) + 1 - sigmoid(1)) / 2 == pytest.approx(0.6108, abs=1e-4)


def test_a_judge_that_only_likes_a_place_says_nothing():
    assert debiased_probability(0.95, 0.95) == pytest.approx(0.5)


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.9999, 1e-9)])
def test_certainty_is_clamped_to_a_hundredth(first, second):
    assert debiased_probability(first, second) == pytest.approx(0.99)
    assert debiased_probability(second, first) == pytest.approx(0.01)


@pytest.mark.parametrize(("wins", "votes", "p"), [(0, 1, 0.25), (1, 1, 0.75), (64, 64, 64.5 / 65), (2, 4, 0.5)])
def test_votes_are_counted_with_half_a_vote_for_either(wins, votes, p):
    assert vote_probability(wins, votes) == pytest.approx(p)


@pytest.mark.parametrize("q", [-1.0, 0.0, 0.5, 1.0])
def test_sixty_four_votes_in_both_orders_are_within_two_points(q):
    # of a judge with a bias of 2 logits, on average over 2000 pairs: the rest is the noise of 128 votes
    rng = np.random.default_rng(1)
    first, second = rng.binomial(64, sigmoid(q + 2), 2000), rng.binomial(64, sigmoid(-q + 2), 2000)
    labels = [
        debiased_probability(vote_probability(a, 64), vote_probability(b, 64))
        for a, b in zip(first, second, strict=True)
    ]
    assert np.mean(labels) == pytest.approx(sigmoid(q), abs=0.02)


def test_the_true_rate_behind_an_imperfect_judge():
    # of a true rate 5/7: 5/7·.8 + 2/7·.1 = .6 is what the judge says yes to
    theta, low, high = rogan_gladen(0.6, 500, specificity=0.9, negatives=100, sensitivity=0.8, positives=100)
    assert theta == pytest.approx(5 / 7)
    assert low < theta < high


def test_nothing_follows_from_a_judge_no_better_than_chance():
    assert rogan_gladen(0.6, 500, specificity=0.4, negatives=100, sensitivity=0.6, positives=100) is None


@pytest.mark.parametrize(
    ("theta", "q0", "q1", "n", "m"),
    [(0.5, 0.8, 0.7, 400, 100), (0.3, 0.9, 0.8, 1000, 150), (0.7, 0.75, 0.85, 500, 200), (0.1, 0.9, 0.9, 500, 100)],
)
def test_the_interval_covers_95_percent_of_the_studies(theta, q0, q1, n, m):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        said = rng.binomial(n, theta * q1 + (1 - theta) * (1 - q0)) / n
        found = rogan_gladen(
            said, n, specificity=rng.binomial(m, q0) / m, negatives=m, sensitivity=rng.binomial(m, q1) / m, positives=m
        )
        covered += found is not None and found[1] <= theta <= found[2]
    assert 0.93 <= covered / 4000 <= 0.97
