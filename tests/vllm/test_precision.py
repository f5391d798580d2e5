"""vLLM with truncated sampling, and in bfloat16: log-probs beside the trainer's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from served_by_vllm import LONGEST, SAMPLING, gap, model_of, perturb, prompts
from tether.config import SamplingConfig, VLLMConfig
from tether.errors import TrainingError
from tether.models.language_model import LanguageModel
from tether.runs.bounds import PROBE_GAP, SAMPLER_GAP
from tether.samplers.vllm import Room, VLLMSampler


def sampler_of(model: LanguageModel, python: str, folder: Path, **sampling) -> VLLMSampler:
    sampler = VLLMSampler(model, SamplingConfig("vllm", vllm=VLLMConfig(python), **sampling), Room(folder, 18, LONGEST))
    sampler.load_weights(model, 0)
    return sampler


def test_under_top_k_the_logprobs_are_those_before_it(python, tmp_path):
    model = model_of(tied=False)
    sampler = sampler_of(model, python, tmp_path, top_k=3)
    found = sampler.generate(prompts(), replace(SAMPLING, top_k=3), cycle=1)
    sampler.close()
    assert gap(model, found) <= 1e-4
    assert "check/truncated_mass is empty" in sampler.notes[0]
    assert all(math.isnan(x) for row in found.truncated_mass for x in row)
    for prompt, ids in zip(found.prompts, found.response_ids, strict=True):
        with torch.no_grad():
            logits = model.lm(torch.tensor([[*prompt.ids, *ids]]), use_cache=False).logits[0]
        for t, i in enumerate(ids):
            assert i in logits[len(prompt.ids) - 1 + t].topk(3).indices


def test_in_bfloat16_both_sides_agree_up_to_rounding_and_other_weights_are_still_told_apart(
    python, tmp_path, monkeypatch
):
    model = LanguageModel(model_of(tied=True).lm, torch.bfloat16)  # float32 masters, as a run in bfloat16 has
    sampler = sampler_of(model, python, tmp_path)
    largest = []
    for version in range(1, 6):
        perturb(model, version)
        sampler.load_weights(model, version)
        largest.append(max(sampler.gaps))
    apart = gap(model, sampler.generate(prompts(), SAMPLING, cycle=1))
    ask = sampler._process.ask
    perturb(model, 6)
    with monkeypatch.context() as patched:
        patched.setattr(sampler._process, "ask", lambda **request: {} if request["do"] == "load" else ask(**request))
        with pytest.raises(TrainingError, match="still has the weights of version 5"):
            sampler.load_weights(model, 6)
    sampler.close()
    assert max(largest) <= PROBE_GAP["bfloat16"] / 2
    assert apart <= 4 * SAMPLER_GAP["bfloat16"]
    assert sampler._facts["dtype"] == "bfloat16"
