"""One token from logits and a uniform: against exact probabilities."""

import math
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from tether.errors import TrainingError
from tether.samplers.draw import draw, truncate
from tether.train.preamble import deterministic

LOGITS = torch.tensor([2.0, 0.1, -1.0, 1.3, 0.9, -0.4, -3.0, 0.5])


def exact(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution that is asked for, in plain Python: temperature, then top-k, then top-p; renormalized."""
    weights = [math.exp(x / temperature) for x in LOGITS.tolist()]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda v: -p[v])
    if top_k:
        order = order[:top_k]
    mass, kept = sum(p[v] for v in order), []
    for v in order:
        kept.append(v)
        if sum(p[u] for u in kept) >= top_p * mass:
            break
    total = sum(p[v] for v in kept)
    return [p[v] / total if v in kept else 0.0 for v in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (0.8, 5, 0.9), (1.0, 1, 1.0)],
)
def test_tokens_are_drawn_with_their_exact_probabilities(temperature, top_k, top_p):
    n, want = 20_000, exact(temperature, top_k, top_p)
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = draw(LOGITS.expand(n, -1), uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(drawn.tokens, minlength=len(want)).tolist()
    assert all(count == 0 for count, p in zip(counts, want, strict=True) if p == 0)
    chi2 = sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, want, strict=True) if p > 0)
    assert chi2 < 24.3  # 7 degrees of freedom at most: probability .001, and the seed is fixed


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 3, 1.0), (0.8, 5, 0.9)])
def test_log_probs_are_before_the_filters_and_what_those_cut_is_told(temperature, top_k, top_p):
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    drawn = draw(LOGITS.expand(50, -1), uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    whole, kept = exact(temperature, 0, 1.0), exact(temperature, top_k, top_p)
    cut = sum(p for p, k in zip(whole, kept, strict=True) if k == 0)
    assert_close(drawn.truncated_mass, torch.full((50,), float(cut)), atol=1e-6, rtol=0)
    want = [math.log(whole[v]) for v in drawn.tokens.tolist()]
    assert_close(drawn.logprobs, torch.tensor(want), atol=1e-6, rtol=0)


def test_the_token_is_where_the_uniform_falls_in_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-12], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_token_without_probability_is_never_drawn_not_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert set(draw(logits, uniforms, temperature=1.0).tokens.tolist()) <= {1, 3}


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_no_other():
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert_close(truncate(probs, top_k=0, top_p=0.5), torch.tensor([[0.0, 0.4, 0.3, 0.0]]))
    assert_close(truncate(probs, top_k=0, top_p=0.01), torch.tensor([[0.0, 0.4, 0.0, 0.0]]))
    # of what top-k left, not of everything: .4 is 4/7 of it
    assert_close(truncate(probs, top_k=2, top_p=0.5), torch.tensor([[0.0, 0.4, 0.0, 0.0]]))
    assert truncate(probs, top_k=9, top_p=1.0) is probs


def test_logits_that_are_not_finite_stop_the_run():
    with pytest.raises(TrainingError, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, dtype=torch.float64), temperature=1.0)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, and whose cumsum is torch's there."""

    is_cuda = True
    rows: ClassVar[list[int]] = []

    def cumsum(self, *args, **kwargs):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        self.rows.append(len(self))
        return self.as_subclass(torch.Tensor).cumsum(*args, **kwargs)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_deterministic_run_draws_on_a_gpu_and_never_scans_a_single_row(monkeypatch, rows, top_p):
    logits = LOGITS.repeat(rows, 1) + torch.arange(rows)[:, None] * torch.linspace(-1, 1, 8)
    uniforms = torch.linspace(0.1, 0.8, rows, dtype=torch.float64)
    want = draw(logits, uniforms, temperature=1.0, top_p=top_p)
    monkeypatch.setattr(OnCuda, "rows", [])
    with deterministic(True):
        got = draw(logits.as_subclass(OnCuda), uniforms, temperature=1.0, top_p=top_p)
        assert torch.are_deterministic_algorithms_enabled()
    assert OnCuda.rows == [max(2, rows)] * (1 if top_p == 1.0 else 2)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs)


def test_a_uniform_on_the_very_end_still_draws_a_token_that_has_mass():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    almost_one = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    assert draw(logits, almost_one, temperature=1.0).tokens.tolist() == [1, 1]
    assert draw(logits, torch.ones(2, dtype=torch.float64), temperature=1.0).tokens.tolist() == [1, 1]
