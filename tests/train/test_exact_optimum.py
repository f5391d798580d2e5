"""PPO against optima that enumeration knows: the small version of bench/exact.py, through the same public door."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
import exact


def test_the_bandit_task_is_the_published_one():
    # softmax(-0.3 k) over 8 arms, r = sin k, β = 1: E r* and KL* computed apart, by hand-written sums.
    import math

    ref = [math.exp(-0.3 * k) for k in range(8)]
    best = [p * math.exp(math.sin(k)) for k, p in enumerate(ref)]
    ref, best = ([p / sum(ps) for p in ps] for ps in (ref, best))
    score, kl = exact.TASKS["E1 β=1"].known
    assert sum(p * math.sin(k) for k, p in enumerate(best)) == pytest.approx(score, abs=1e-6)
    assert sum(p * math.log(p / q) for p, q in zip(best, ref, strict=True)) == pytest.approx(kl, abs=1e-6)


def test_ppo_reaches_the_bandits_optimum():
    result = exact.run("E1 β=.5", seed=0, cycles=40)
    score, kl = exact.TASKS["E1 β=.5"].known
    assert result["kl_to_optimum"] <= 0.01
    assert result["value_rmse"] <= 0.05
    assert result["score"] == pytest.approx(score, abs=0.02)
    assert result["kl_to_reference"] == pytest.approx(kl, abs=0.05)


@pytest.mark.slow
def test_ppo_reaches_the_optimum_when_responses_stop_at_different_lengths():
    result = exact.run("E3 length", seed=0, cycles=60)
    assert result["kl_to_optimum"] <= 0.01
    assert result["value_rmse"] <= 0.05
    for _, true, sampled in result["gaps"]:
        assert abs(sampled - true) <= max(0.002, 0.15 * true)
