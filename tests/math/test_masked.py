"""Statistics under a mask, against numpy on the counted numbers alone."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tether.math import masked_mean, masked_sum, masked_var, whiten

X = torch.tensor([[1.0, -2.0, 5.0], [0.5, math.nan, math.inf]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
COUNTED = np.array([1.0, -2.0, 5.0, 0.5])


@pytest.mark.parametrize(("function", "oracle"), [(masked_sum, np.sum), (masked_mean, np.mean), (masked_var, np.var)])
def test_statistics_are_numpys_of_the_counted_numbers_whatever_the_padding_holds(function, oracle):
    assert_close(function(X, MASK), torch.tensor(oracle(COUNTED), dtype=torch.float32))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var])
def test_padding_gets_no_gradient_not_even_from_nan(function):
    x = X.clone().requires_grad_()
    function(x, MASK).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()
    assert (x.grad[MASK] != 0).all()


def test_whitening_uses_the_biased_variance_plus_1e_8():
    x = COUNTED * 1e-4  # small enough to feel the 1e-8
    want = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    got = whiten(torch.where(MASK, X * 1e-4, X), MASK)
    assert_close(got[MASK], torch.tensor(want, dtype=torch.float32))


def test_whitening_leaves_zeros_in_the_padding_and_does_not_depend_on_it():
    got = whiten(X, MASK)
    assert (got[~MASK] == 0).all()
    wider = torch.cat([X, torch.full((2, 3), math.nan)], dim=1)
    wider_mask = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert_close(whiten(wider, wider_mask)[:, :3], got)


def test_whitening_is_over_the_whole_batch_not_row_by_row():
    x = torch.tensor([[0.0, 2.0], [10.0, 12.0]])
    got = whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert got[0].max() < 0 < got[1].min()  # row by row, every row would have mean 0


def test_whitening_a_constant_gives_zeros():
    x = torch.full((2, 3), 7.0)
    assert_close(whiten(x, MASK), torch.zeros(2, 3))
