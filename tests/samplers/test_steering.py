"""Sampling that Q-learning's heads steer: the local engine against a naive loop, and the log-probs that it reports."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tether.models.ilql import ILQLHeads, Steering
from tether.samplers.local import LocalSampler
from tether.types import Prompt, Sampling
from tiny import language_model, random_ids, randomize

MODEL = language_model()
WIDTH, VOCABULARY = MODEL.config.hidden_size, MODEL.config.vocab_size
SAMPLING = Sampling(0.8, max_new_tokens=6, stop_token_ids=(2, 3), responses_per_prompt=3, seed=4)
PROMPTS = [Prompt(tuple(ids), "", i) for i, ids in enumerate(random_ids([5, 1, 9]))]


def steered(strength: float, top_k: int, model=MODEL):
    heads = ILQLHeads(WIDTH, VOCABULARY)
    randomize(heads.target_q1, seed=1, std=0.1)
    randomize(heads.target_q2, seed=2, std=0.1)
    return replace(model, steer=Steering(heads.state_dict(), strength=strength, top_k=top_k)), heads


@torch.no_grad()
def slow_logprobs(
    heads: ILQLHeads, prompt: list[int], response: list[int], strength: float, top_k: int
) -> torch.Tensor:
    """[R, V] in float64, prefix by prefix, off transformers' own logits."""
    found = []
    for t in range(len(response)):
        output = MODEL.lm(input_ids=torch.tensor([[*prompt, *response[:t]]]), output_hidden_states=True)
        hidden, logits = output.hidden_states[-1][0, -1], output.logits[0, -1].double()
        q = torch.minimum(*(h.last(h.first(hidden).relu()) for h in (heads.target_q1, heads.target_q2))).double()
        shifted = logits.log_softmax(0) + strength * q
        if top_k and strength:
            shifted[logits.argsort(descending=True)[top_k:]] = -torch.inf
        found.append((shifted / SAMPLING.temperature).log_softmax(0))
    return torch.stack(found)


@pytest.mark.parametrize(("strength", "top_k"), [(3.0, 4), (3.0, 0), (0.0, 4)])
@pytest.mark.parametrize("cached", [True, False])
def test_log_probs_are_those_of_what_was_sampled_from(strength, top_k, cached):
    model, heads = steered(strength, top_k)
    sampler = LocalSampler(model, slots=4)
    sampler.cached = cached
    got = sampler.generate(PROMPTS, SAMPLING, cycle=1)
    for prompt, ids, reported in zip(got.prompts, got.response_ids, got.sampler_logprobs, strict=True):
        want = slow_logprobs(heads, list(prompt.ids), ids, strength, top_k)
        assert_close(torch.tensor(reported).double(), want[range(len(ids)), ids], atol=1e-4, rtol=0)
    # and the path that evaluation measures KL by, with the entropy of what was sampled from
    logprobs, entropies, _ = model.response_logprobs(got.rows(), temperature=SAMPLING.temperature, entropy=True)
    assert_close(logprobs, torch.tensor([x for row in got.sampler_logprobs for x in row]), atol=1e-4, rtol=0)
    first = slow_logprobs(heads, list(PROMPTS[0].ids), [0], strength, top_k)[0]
    assert_close(entropies[0].double(), -(first.exp() * first.clamp(min=-1e9)).sum(), atol=1e-4, rtol=0)


def test_at_strength_0_the_same_tokens_are_drawn_as_from_the_language_model():
    model, _ = steered(0.0, 2)
    want = LocalSampler(MODEL).generate(PROMPTS, SAMPLING, cycle=1)
    got = LocalSampler(model).generate(PROMPTS, SAMPLING, cycle=1)
    assert got == want


def test_at_a_great_strength_the_best_of_the_likeliest_tokens_is_drawn():
    model, heads = steered(1e4, 3)
    got = LocalSampler(model).generate(PROMPTS, SAMPLING, cycle=1)
    for prompt, ids in zip(got.prompts, got.response_ids, strict=True):
        likeliest = slow_logprobs(heads, list(prompt.ids), ids, 1e-9, 3)
        best = slow_logprobs(heads, list(prompt.ids), ids, 1e4, 3).argmax(1)
        assert ids == best.tolist()
        assert likeliest[range(len(ids)), ids].isfinite().all()


def test_a_copy_in_bfloat16_is_steered_too():
    model, _ = steered(1e4, 3)
    found = []
    for one in (model, replace(model, steer=None)):
        sampler = LocalSampler(replace(one, dtype=torch.bfloat16))
        assert sampler.model.lm is not one.lm  # its weights are its own
        found.append(sampler.generate(PROMPTS, SAMPLING, cycle=1))
    assert min(min(row) for row in found[0].sampler_logprobs) > -0.1  # as good as certain
    assert found[0].response_ids != found[1].response_ids
