"""What an engine beside the trainer is given to load, and what its answers to the probe tell. vLLM itself is asked in
tests/vllm; here its part is played by the models themselves."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tether.models.export import save_for_engine
from tether.models.language_model import LanguageModel
from tether.samplers.vllm_probe import Answers, Probe, differing, score
from tiny import VOCABULARY, language_model, randomize

TOKENS = torch.arange(12)[None] * 7 % VOCABULARY


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm(TOKENS).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_engine_is_given_the_same_function_with_a_head_of_its_own(tmp_path, architecture):
    model = language_model(architecture)
    tied = model.config.tie_word_embeddings
    save_for_engine(model, tmp_path, torch.float32)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model.lm))
    assert model.config.tie_word_embeddings == tied  # the trainer's own model is as it was


def test_adapters_are_merged_and_weights_narrowed(tmp_path):
    tuned = get_peft_model(language_model().lm, LoraConfig(r=2, target_modules="all-linear"))
    randomize(tuned, std=0.1)
    save_for_engine(LanguageModel(tuned, torch.float32), tmp_path / "wide", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    torch.testing.assert_close(logits(again), logits(tuned), atol=1e-5, rtol=1e-5)
    save_for_engine(LanguageModel(tuned, torch.float32), tmp_path / "narrow", torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "narrow" / "model.safetensors").values()} == {torch.bfloat16}


PROBE = Probe.of(VOCABULARY, longest=80, block=16)
DRAWN = [3, 1, 4, 1]


def models() -> tuple[LanguageModel, LanguageModel]:
    """The weights of version 4, and those of version 5."""
    old = language_model(tie_word_embeddings=False)
    new = LanguageModel(copy.deepcopy(old.lm), torch.float32)
    with torch.no_grad():
        for p in new.lm.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return old, new


def told(new: LanguageModel, engine: Answers, old: LanguageModel, folder) -> str:
    save_for_engine(old, folder, torch.float32)
    return differing(new, PROBE, engine, score(old, PROBE, DRAWN, 1.0), folder, 4, 1e-4)


def test_the_probe_fits_the_engine_and_passes_a_block_of_its_cache():
    assert (len(PROBE.text), len(PROBE.prompt)) == (64, 24)
    small = Probe.of(VOCABULARY, longest=12, block=16)
    assert (len(small.text), len(small.prompt)) == (11, 8)
    assert all(0 <= i < VOCABULARY for i in [*PROBE.text, *PROBE.prompt])


def test_the_trainers_logprobs_of_the_probe_are_those_of_plain_forward_passes():
    _, model = models()
    got = score(model, PROBE, DRAWN, 0.5)
    with torch.no_grad():
        text = model.lm(torch.tensor([PROBE.text])).logits[0].log_softmax(-1)
        both = (model.lm(torch.tensor([[*PROBE.prompt, *DRAWN]])).logits[0] / 0.5).log_softmax(-1)
    want = torch.stack([text[t, i] for t, i in enumerate(PROBE.text[1:])])
    torch.testing.assert_close(got.scored, want, atol=1e-5, rtol=1e-5)
    want = torch.stack([both[len(PROBE.prompt) - 1 + t, i] for t, i in enumerate(DRAWN)])
    torch.testing.assert_close(got.continued, want, atol=1e-5, rtol=1e-5)


def test_an_engine_that_kept_everything_or_its_head_alone_is_told_apart(tmp_path):
    old, new = models()
    assert told(new, score(old, PROBE, DRAWN, 1.0), old, tmp_path / "a") == "It still has the weights of version 4."
    mixed = LanguageModel(copy.deepcopy(new.lm), torch.float32)
    mixed.lm.lm_head.weight.data.copy_(old.lm.lm_head.weight)
    found = told(new, score(mixed, PROBE, DRAWN, 1.0), old, tmp_path / "b")
    assert found == "Its head is still that of version 4; its layers are new."
    mixed.lm.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert "a part of them was not loaded" in told(new, score(mixed, PROBE, DRAWN, 1.0), old, tmp_path / "c")


def test_cached_keys_of_earlier_weights_are_told_from_weights(tmp_path):
    old, new = models()
    right, stale = score(new, PROBE, DRAWN, 1.0), score(old, PROBE, DRAWN, 1.0)
    engine = replace(right, continued=stale.continued)
    assert "it reads cached keys of other weights" in told(new, engine, old, tmp_path)
    assert engine.gaps(right)[0] == 0
    assert engine.gaps(right)[1] > 1e-3


def test_a_logprob_that_is_not_a_number_is_an_infinite_gap():
    _, new = models()
    right = score(new, PROBE, DRAWN, 1.0)
    broken = replace(right, scored=right.scored.clone().fill_(float("nan")))
    assert broken.gaps(right)[0] == float("inf")
    assert replace(right, continued=right.continued[:2]).gaps(right)[1] == float("inf")
