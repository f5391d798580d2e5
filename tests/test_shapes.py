"""Shapes and dtypes that `tether.math` and `tether.types` promise are checked at every call while the tests run."""

import subprocess
import sys

import jaxtyping
import pytest
import torch

from tether.errors import BatchError
from tether.math import gae, nll_loss, token_logprobs
from tether.types import Rollout, Rows

MASK = torch.ones(2, 3, dtype=torch.bool)


def rows(**changes: torch.Tensor) -> Rows:
    fields = {"tokens": torch.zeros(2, 5, dtype=torch.long), "prompt_lengths": torch.tensor([1, 2])}
    return Rows(**fields | {"response_lengths": torch.tensor([3, 2])} | changes)


def rollout(**changes: torch.Tensor) -> Rollout:
    names = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    return Rollout(rows(), **{name: torch.zeros(2, 3) for name in names} | changes)


@pytest.mark.parametrize(
    "call",
    [
        # [2, 1] would broadcast to [2, 3], and the advantages would be wrong
        lambda: gae(torch.zeros(2, 3), torch.zeros(2, 1), MASK, gamma=1.0, lam=1.0),
        lambda: nll_loss(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool), denominator=1),
        lambda: nll_loss(torch.zeros(2, 3), torch.ones(2, 3), denominator=1),  # a mask that is no bool
        lambda: token_logprobs(torch.zeros(4, 8), torch.zeros(8, 16), torch.zeros(4, dtype=torch.long)),
        lambda: rows(tokens=torch.zeros(2, 5)),
        lambda: rows(prompt_lengths=torch.tensor([1, 2, 3])),
        lambda: rows().select(MASK[0]),
        lambda: rollout(advantages=torch.zeros(3, 2)),
        lambda: rollout(values=torch.zeros(2, 3, dtype=torch.long)),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused_while_tests_run(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_right_shapes_pass():
    whole = rollout()
    assert whole.select(torch.tensor([1])).advantages.shape == (1, 2)
    assert rollout(values=None, returns=None).values is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows(tokens=torch.zeros(5, dtype=torch.long)), r"tokens is \[5\], want \[B, T\]"),
        (lambda: rows(prompt_lengths=torch.tensor([1, 2, 3])), r"prompt_lengths is \[3\], want \[B\] = \[2\]"),
        (
            lambda: rollout(advantages=torch.zeros(3, 2)),
            r"advantages is \[3, 2\], but the response mask is .* \[2, 3\]",
        ),
    ],
)
def test_batches_of_wrong_shapes_are_refused_in_production_too(monkeypatch, make, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(BatchError, match=message):
        make()


def test_production_loads_neither_the_checker_nor_jaxtyping():
    code = "import sys, tether.math, tether.types; assert not {'jaxtyping', 'beartype'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
