"""vLLM itself, on a CPU in float32, beside the trainer's model: weights, log-probs, seeds, and what must be caught."""

import os
import signal
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from served_by_vllm import LONGEST, SAMPLING, VOCABULARY, gap, model_of, perturb, prompts
from tether.config import SamplingConfig, VLLMConfig
from tether.errors import TrainingError
from tether.models.language_model import LanguageModel
from tether.samplers.vllm import Room, VLLMSampler
from tether.types import Sampling


@pytest.fixture(scope="module", params=["tied", "untied"])
def engine(request, python, tmp_path_factory):
    """An engine that has had weights, and the model that they are of."""
    model = model_of(tied=request.param == "tied")
    folder = tmp_path_factory.mktemp("vllm")
    sampler = VLLMSampler(
        model, SamplingConfig("vllm", vllm=VLLMConfig(python)), Room(folder, 18, LONGEST),
        restarted=lambda why: said.append(why),
    )  # fmt: skip
    said: list[str] = []
    sampler.said = said
    sampler.load_weights(model, 0)
    yield sampler, model
    sampler.close()


def test_twenty_syncs_leave_no_gap(engine):
    sampler, model = engine
    for version in range(1, 21):
        perturb(model, version)
        sampler.load_weights(model, version)
        gaps = sampler.gaps
        assert max(gaps) <= 1e-4, (version, gaps)
    assert gap(model, sampler.generate(prompts(), SAMPLING, cycle=1)) <= 1e-4
    assert len(list(sampler._room.folder.glob("weights-*"))) == 1


def test_tokens_depend_on_seed_cycle_and_response_alone(engine):
    sampler, _ = engine
    asked = prompts()
    whole = sampler.generate(asked, SAMPLING, cycle=3)
    assert sampler.generate(asked, SAMPLING, cycle=3) == whole  # to the bit
    part = sampler.generate(asked[2:4], SAMPLING, cycle=3, first=6)
    assert part.response_ids == whole.response_ids[6:12]
    assert sampler.generate(asked, SAMPLING, cycle=4).response_ids != whole.response_ids
    assert sampler.generate(asked, replace(SAMPLING, seed=6), cycle=3).response_ids != whole.response_ids
    assert sampler.generate(asked, replace(SAMPLING, stream=1), cycle=3).response_ids != whole.response_ids
    first = [whole.response_ids[i] for i in range(3)]
    assert first[0] != first[1] != first[2]  # answers to one prompt


def test_responses_end_with_their_first_stop_token_or_at_the_limit(engine):
    sampler, _ = engine
    free = sampler.generate(prompts(), replace(SAMPLING, stop_token_ids=()), cycle=5)
    assert set(free.finish_reasons) == {"length"}
    assert set(free.lengths) == {12}
    seen = Counter(i for ids in free.response_ids for i in set(ids[:-1]))
    stop = seen.most_common(1)[0][0]
    assert seen[stop] < len(free)
    found = sampler.generate(prompts(), replace(SAMPLING, stop_token_ids=(stop,)), cycle=5)
    for ids, whole, why in zip(found.response_ids, free.response_ids, found.finish_reasons, strict=True):
        assert ids == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert why == ("stop" if stop in whole else "length")


def test_tokens_are_drawn_as_often_as_the_model_says(engine):
    sampler, model = engine
    prompt = prompts()[1]
    with torch.no_grad():
        want = torch.softmax(model.lm(torch.tensor([prompt.ids])).logits[0, -1], -1)
    drawn = sampler.generate([prompt], Sampling(max_new_tokens=1, responses_per_prompt=4000), cycle=6).response_ids
    seen = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCABULARY) / 4000
    # Of 4,000 draws from 300 probabilities, half the sum of |differences| is about Σ sqrt(p / (2π · 4000)) ≤ 0.11.
    assert float((seen - want).abs().sum() / 2) < 0.13


def test_adapters_arrive_merged(engine):
    sampler, model = engine
    tuned = get_peft_model(
        model_of(tied=model.config.tie_word_embeddings).lm, LoraConfig(r=4, target_modules="all-linear")
    )
    lora = LanguageModel(tuned, torch.float32)
    perturb(lora, 1)
    sampler.load_weights(lora, 30)
    assert max(sampler.gaps) <= 1e-4
    assert gap(lora, sampler.generate(prompts(), SAMPLING, cycle=1)) <= 1e-4
    sampler.load_weights(model, 31)


def test_an_engine_that_kept_its_head_is_caught(engine, monkeypatch):
    sampler, model = engine
    sampler.load_weights(model, 40)
    write, old = sampler.write, sampler._weights

    def with_the_old_head(directory):
        write(directory)
        head = load_file(old / "model.safetensors")["lm_head.weight"]
        save_file(
            load_file(directory / "model.safetensors") | {"lm_head.weight": head}, directory / "model.safetensors"
        )

    perturb(model, 40)
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "write", with_the_old_head)
        with pytest.raises(TrainingError, match="Its head is still that of version 40; its layers are new"):
            sampler.load_weights(model, 41)
    sampler.load_weights(model, 42)


def test_an_engine_that_loaded_nothing_is_caught(engine, monkeypatch):
    sampler, model = engine
    sampler.load_weights(model, 50)
    ask = sampler._process.ask
    perturb(model, 50)
    with monkeypatch.context() as patched:
        patched.setattr(sampler._process, "ask", lambda **request: {} if request["do"] == "load" else ask(**request))
        with pytest.raises(TrainingError, match="still has the weights of version 50"):
            sampler.load_weights(model, 51)
    sampler.load_weights(model, 52)


def test_keys_that_were_cached_under_earlier_weights_are_caught(engine, monkeypatch):
    sampler, model = engine
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "salt", lambda use: "always the same")
        sampler.load_weights(model, 60)
        perturb(model, 60)
        with pytest.raises(TrainingError, match="read afresh scores right, so it reads cached keys"):
            sampler.load_weights(model, 61)
    sampler.load_weights(model, 62)


def test_a_killed_engine_is_started_again_and_gives_the_same_tokens(engine):
    sampler, model = engine
    sampler.load_weights(model, 70)
    asked, told = prompts(), len(sampler.said)
    if model.config.tie_word_embeddings:  # killed between two requests
        want = sampler.generate(asked, SAMPLING, cycle=7)
        os.kill(sampler.pid, signal.SIGKILL)
        assert sampler.generate(asked, SAMPLING, cycle=7) == want
    else:  # in the middle of an answer
        much = replace(SAMPLING, responses_per_prompt=60, stop_token_ids=())
        threading.Timer(0.5, os.kill, (sampler.pid, signal.SIGKILL)).start()
        found = sampler.generate(asked, much, cycle=7)
        assert sampler.generate(asked, much, cycle=7) == found
        assert gap(model, found) <= 1e-4
    assert len(sampler.said) == told + 1
    assert "was killed by signal 9: it is started again" in sampler.said[-1]
