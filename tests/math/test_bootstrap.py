"""Intervals of a mean, against the normal theory that they must approach."""

import math

import pytest
import torch

from tether.math import bootstrap_mean


def test_an_interval_is_as_wide_as_the_standard_error_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 5
    mean, low, high = bootstrap_mean(values)
    assert mean == pytest.approx(values.mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(400), rel=0.08)


def test_a_95_percent_interval_covers_the_truth_about_that_often():
    generator = torch.Generator().manual_seed(1)
    samples = torch.rand(200, 60, generator=generator)  # the truth is ½
    covered = sum(low <= 0.5 <= high for _, low, high in (bootstrap_mean(s, draws=400) for s in samples))
    assert 180 <= covered <= 198


def test_equal_values_leave_no_doubt_and_one_value_claims_none():
    assert bootstrap_mean(torch.full((7,), 2.0)) == (2.0, 2.0, 2.0)
    assert bootstrap_mean(torch.tensor([3.0])) == (3.0, 3.0, 3.0)


def test_the_same_seed_gives_the_same_interval():
    values = torch.arange(50.0)
    whole = bootstrap_mean(values, seed=4)
    assert whole == bootstrap_mean(values, seed=4)
    assert whole[1:] != bootstrap_mean(values, seed=5)[1:]
