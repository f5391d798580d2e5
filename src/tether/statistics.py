"""Statistics that every room may use, without torch."""

from __future__ import annotations

import math

_Z = 1.959964  # two-sided 95 %


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """(low, high) of Wilson's 95 % score interval for a share among `count`, which need not be whole.

    It stays within [0, 1], and has a width at 0 and 1 too. Source: Wilson 1927.
    """
    center = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    low = 0.0 if share == 0 else max(0.0, center - half)  # exactly, whatever rounding makes of it
    high = 1.0 if share == 1 else min(1.0, center + half)
    return low, high


# ---------------------------------------------------------------- judges


def debiased_probability(first: float, second: float) -> float:
    """P(a is better than b) of a judge that was asked in both orders, without its liking for a place.

        T = σ(½ (logit p_ab − logit p_ba)),   p = P(the answer that is shown first wins)

    first: p_ab, where a was shown first. second: p_ba, where b was. Exact where the liking adds to the logit: of q = 1
    and a bias of 2, p_ab = σ(3), p_ba = σ(1), T = σ(1) = .7311; the mean of p_ab and 1 − p_ba would be .6108.
    """
    return sigmoid((_logit(clamp_probability(first)) - _logit(clamp_probability(second))) / 2)


def clamp_probability(p: float) -> float:
    """p within [.01, .99]: beyond, a logit tells how a model rounds and not how sure it is."""
    return min(max(p, 0.01), 0.99)


def vote_probability(wins: int, votes: int) -> float:
    """A probability from votes, (k + ½) / (n + 1): never 0 or 1, however few they are (Jeffreys' prior)."""
    return (wins + 0.5) / (votes + 1)


def rogan_gladen(
    share: float, count: int, *, specificity: float, negatives: int, sensitivity: float, positives: int
) -> tuple[float, float, float] | None:
    """(θ, low, high): the true rate behind what an imperfect judge says, with its 95 % interval; None for 0/0.

        θ = (p + q₀ − 1) / (q₀ + q₁ − 1)

    share: p, of `count` items the judge says yes to.
    specificity, negatives: q₀, the share of items known to be no of which the judge says no, and how many they are.
    sensitivity, positives: q₁, likewise of those known to be yes.
    The interval takes in that q₀ and q₁ are measured too, with pseudo-counts and a shift against the bias of a ratio.
    None where q₀ + q₁ ≤ 1: the judge is no better than chance, and nothing follows from what it says.

    Sources: Rogan & Gladen 1978; Lang & Reiczigel 2014, eq. 4–7, as in arXiv:2511.21140.
    """
    if specificity + sensitivity <= 1:
        return None
    theta = (share + specificity - 1) / (specificity + sensitivity - 1)
    n, m0, m1 = count + _Z**2, negatives + 2, positives + 2
    p = (share * count + _Z**2 / 2) / n
    q0, q1 = (specificity * negatives + 1) / m0, (sensitivity * positives + 1) / m1
    if q0 + q1 <= 1:
        return None
    middle = (p + q0 - 1) / (q0 + q1 - 1)
    v0, v1 = q0 * (1 - q0) / m0, q1 * (1 - q1) / m1
    shift = 2 * _Z**2 * (middle * v1 - (1 - middle) * v0)
    half = _Z * math.sqrt(p * (1 - p) / n + (1 - middle) ** 2 * v0 + middle**2 * v1) / (q0 + q1 - 1)
    low, high = middle + shift - half, middle + shift + half
    return _share(theta), _share(low), _share(high)


def _share(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    """1 / (1 + e⁻ˣ), which no x overflows."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
