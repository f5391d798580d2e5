"""Chunked log-probs and entropies: against full logits in fp64, by gradcheck, and by the memory they take."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tether.math import Head, full_logprobs, token_logprobs

N, D, V = 7, 5, 11

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 1.5},
    "everything": {"temperature": 1.3, "scale": 2.0, "softcap": 1.5},
}


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    bias, targets = torch.randn(V, generator=generator), torch.randint(V, (N,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def oracle(hidden, weight, bias, targets, *, temperature=1.0, scale=1.0, softcap=None):
    """The textbook, from full logits."""
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    distribution = torch.distributions.Categorical(logits=z / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_chunked_results_and_gradients_are_those_of_full_logits(head, chunk):
    hidden, weight, bias, targets = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    got = token_logprobs(hidden, weight, targets, bias=bias, chunk=chunk, **head)
    want = oracle(hidden, weight, bias, targets, **head)
    assert_close(got, want)
    weights = torch.randn(2, N, dtype=torch.float64)
    got_gradients = torch.autograd.grad((torch.stack(got) * weights).sum(), leaves)
    assert_close(got_gradients, torch.autograd.grad((torch.stack(want) * weights).sum(), leaves))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradients_pass_gradcheck(head):
    hidden, weight, bias, targets = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, chunk=3, **head),
        leaves,
        check_undefined_grad=False,  # warns about itself
    )


def test_a_head_without_bias_is_a_head_with_bias_0():
    hidden, weight, bias, targets = inputs()
    assert_close(token_logprobs(hidden, weight, targets), token_logprobs(hidden, weight, targets, bias=0 * bias))


@pytest.mark.parametrize("which", [0, 1])
def test_each_result_alone_has_its_own_gradient(which):
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_()
    (got,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, bias=bias)[which].sum(), weight)
    (want,) = torch.autograd.grad(oracle(hidden, weight, bias, targets)[which].sum(), weight)
    assert_close(got, want)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient_and_the_others_theirs(wanted):
    hidden, weight, bias, targets = inputs()
    leaf = (hidden, weight, bias)[wanted].requires_grad_()
    (got,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, bias=bias)[0].sum(), leaf)
    (want,) = torch.autograd.grad(oracle(hidden, weight, bias, targets)[0].sum(), leaf)
    assert_close(got, want)


def test_without_entropy_the_log_probs_are_the_same_and_entropy_is_zero():
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias, entropy=False)
    assert_close(logprobs, oracle(hidden, weight, bias, targets)[0])
    assert (entropy == 0).all()
    assert not entropy.requires_grad


def test_temperature_divides_the_logits_and_a_mismatch_is_far_from_rounding():
    # two tokens, logits 0 and ln 3: p = 3/4 at T = 1, 9/10 at T = 1/2
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    target = torch.tensor([1])
    assert_close(token_logprobs(hidden, weight, target)[0], torch.tensor([math.log(0.75)]))
    assert_close(token_logprobs(hidden, weight, target, temperature=0.5)[0], torch.tensor([math.log(0.9)]))


def test_entropy_is_that_of_the_distribution_not_of_the_sample():
    # uniform over V: ln V nats whatever was sampled, and at its maximum, so without gradient; -log p has one
    weight = torch.zeros(V, D, requires_grad=True)
    logprobs, entropy = token_logprobs(torch.randn(N, D), weight, torch.zeros(N, dtype=torch.long))
    assert_close(entropy, torch.full((N,), math.log(V)))
    assert torch.autograd.grad(entropy.sum(), weight, retain_graph=True)[0].abs().max() < 1e-6
    assert torch.autograd.grad(-logprobs.sum(), weight)[0].abs().max() > 0.1


def test_no_tokens_give_empty_results_and_zero_gradients():
    hidden, weight, _, _ = inputs()
    weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert (gradient == 0).all()


def test_bfloat16_models_get_a_float32_softmax():
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias)
    want = oracle(*(x.detach().double() for x in (hidden, weight, bias)), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs.double(), want[0], atol=1e-5, rtol=0)
    assert_close(entropy.double(), want[1], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), hidden)
    assert gradient.dtype == torch.bfloat16
    exact = [x.detach().double() for x in (hidden, weight, bias)]
    exact[0].requires_grad_()
    (want_gradient,) = torch.autograd.grad(sum(x.sum() for x in oracle(*exact, targets)), exact[0])
    assert_close(gradient.double(), want_gradient, rtol=0.05, atol=0.05)


def test_bfloat16_rounds_the_factors_and_never_the_logits():
    # every product of two bfloat16 is exact in float32; logits of 25 rounded to bfloat16 would be off by up to 0.06
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).mul(1.8).bfloat16() for n in (50, 300))
    exact = hidden.double() @ weight.double().T
    assert exact.abs().max() > 25
    assert_close(Head(weight, dtype=torch.bfloat16).logits(hidden).double(), exact, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(Head(weight, dtype=torch.bfloat16).logits(hidden).double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_samplers_head_gives_the_trainers_log_probs_to_the_bit(head, dtype):
    hidden, weight, bias, targets = inputs(dtype)
    kind = {k: v for k, v in head.items() if k != "temperature"}
    logits = Head(weight, bias, **kind, dtype=dtype).logits(hidden) / head.get("temperature", 1.0)
    sampled = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)
    assert torch.equal(token_logprobs(hidden, weight, targets, bias=bias, **head)[0], sampled)


def test_under_autocast_factors_are_bfloat16_and_float32_masters_get_float32_gradients():
    hidden, weight, bias, targets = inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logprobs(hidden, weight, targets, bias=bias)
    rounded = (hidden.detach().bfloat16().double(), weight.detach().bfloat16().double(), bias.detach().double())
    assert_close(got[0].double(), oracle(*rounded, targets)[0], atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(sum(x.sum() for x in got), leaves)
    want = torch.autograd.grad(sum(x.sum() for x in oracle(hidden, weight, bias, targets)), leaves)
    for a, b in zip(gradients, want, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=0.05, atol=0.05)


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
    # 2,000 equal chunks: a bfloat16 sum stops growing when a term falls below half a unit in its last place
    n = 2000
    hidden, weight = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), chunk=1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert_close(gradient.float(), torch.tensor([[n / 2], [-n / 2]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_logits_give_the_same_pair(temperature):
    hidden, weight, bias, targets = inputs()
    logits = (hidden @ weight.T + bias).requires_grad_()
    got = full_logprobs(logits, targets, temperature=temperature)
    want = oracle(hidden, weight, bias, targets, temperature=temperature)
    assert_close(got, want)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    (got_gradient,) = torch.autograd.grad(sum(x.sum() for x in got), logits)
    want_loss = distribution.log_prob(targets).sum() + distribution.entropy().sum()
    assert_close(got_gradient, torch.autograd.grad(want_loss, logits)[0])
    assert (full_logprobs(logits, targets, entropy=False)[1] == 0).all()


def test_full_logits_may_forbid_a_token_with_minus_infinity():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    logprobs, entropy = full_logprobs(logits, torch.tensor([1]))
    assert_close(logprobs, torch.tensor([-math.log(2)]))
    assert_close(entropy, torch.tensor([math.log(2)]))
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert_close(gradient, torch.tensor([[-0.5, 0.5, 0.0]]))


_MEASURE = """
import pathlib, torch
from tether.math import token_logprobs
def peak():  # KiB since this program began; ru_maxrss would begin with that of the process that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
n, v, d = 8 * 512, 50_000, 64
hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
(torch.randn(256, 256) @ torch.randn(256, 256)).exp().sum()  # the libraries' own buffers
before = peak()
logprobs, entropy = token_logprobs(hidden, weight, torch.randint(v, (n,)))
(logprobs.sum() + entropy.sum()).backward()
print((peak() - before) * 1024 / (n * v * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forward_and_backward_take_less_than_a_tenth_of_the_logits_memory():
    # The peak does not grow with n, so a larger batch has a smaller share. glibc keeps freed blocks of up to 32 MiB for
    # later, which adds up to twice as much again by luck; under a fixed threshold it gives them back at once.
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, env=fixed)
    share = float(done.stdout)
    assert 0 < share < 0.1


def test_small_log_probs_are_kept_for_the_backward_pass_and_give_the_gradients_of_ones_that_are_not(monkeypatch):
    def gradients() -> tuple[bool, list[torch.Tensor]]:
        hidden, weight, bias, targets = inputs()
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        logprobs, entropies = token_logprobs(hidden, weight, targets, bias=bias, chunk=3)
        loss = (logprobs * torch.arange(N)).sum() - 0.3 * entropies.sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))  # what is kept is not used up
        return len(logprobs.grad_fn.kept) == 3, first

    kept, with_them = gradients()
    monkeypatch.setattr("tether.math.logprobs._KEPT_BYTES", 0)
    not_kept, without = gradients()
    assert kept
    assert not not_kept
    assert all(map(torch.equal, with_them, without))
