"""Every architecture goes the whole way: sft → reward → ppo → qlearning; full and with adapters, exported, reloaded."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tether
from conftest import ARCHITECTURES
from tether.config import (
    DataConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    QLearningConfig,
    QLearningSection,
    RewardConfig,
    RewardModelSection,
    RewardSourceConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
    SFTSection,
)
from tether.train import ppo as ppo_module
from tiny_ppo import STOPS, tiny_config

QUIET, FAST = LogConfig(tensorboard=False), OptimConfig(lr=1e-2)
PAIRS = [{"prompt": f"{letter}?", "chosen": "yes", "completion": "yes", "rejected": "no"} for letter in "abcdefgh"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Preference pairs that are examples to imitate as well."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return DataConfig(path=str(path), max_tokens=64)


@pytest.mark.learning
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "adapters"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_the_whole_way(
    tiny_model, pairs, tmp_path, monkeypatch, architecture, lora, seed, record_property
):
    padded = tiny_model(architecture, seed=seed, vocab_size=264)  # more embeddings than tokens, as many real models
    base = SFTModelConfig(policy=str(padded), lora=lora)
    imitated = tether.sft(
        SFTConfig(
            run=str(tmp_path / "sft"), seed=seed, model=base, data=pairs, sft=SFTSection(batch=4), optim=FAST, log=QUIET
        )
    )  # fmt: skip
    judged = tether.reward_model(
        RewardConfig(
            run=str(tmp_path / "reward"), seed=seed, model=base, data=pairs, optim=FAST, log=QUIET,
            reward_model=RewardModelSection(batch=4, test_fraction=0.25),
        )
    )  # fmt: skip

    policies = []
    build = ppo_module.build_policy

    def kept(*args, **kwargs):
        built = build(*args, **kwargs)
        policies.append(built[0])
        return built

    monkeypatch.setattr(ppo_module, "build_policy", kept)
    config = tiny_config(
        tmp_path / "ppo", imitated.final, ppo={"cycles": 1}, evaluate={"every": 0}, optim={"lr": 1e-2},
        model={"policy": str(imitated.final), "lora": lora},
    )  # fmt: skip
    run = tether.ppo(replace(config, seed=seed, reward=[RewardSourceConfig(model=str(judged.final))]))
    record_property("first ratio error", run.metrics[0]["check/first_ratio_error"])
    record_property("sampler gap", run.metrics[0]["check/sampler_gap"])
    assert run.metrics[0]["check/first_ratio_error"] <= 1e-5
    assert run.metrics[0]["check/sampler_gap"] <= 1e-4
    assert not [e for e in run.events if e["event"] == "fallback"]  # the head is ours, and the cache holds

    replayed = QLearningConfig(
        str(tmp_path / "replay"), ModelConfig(str(imitated.final), lora=lora), ScoredConfig(str(run.path)),
        seed=seed, optim=FAST, log=QUIET,
    )  # fmt: skip
    learned = tether.qlearning(replayed)  # the export compares its reloaded logits with the trained model's
    assert abs(learned.metrics[0]["qlearning/log_ratio"]) <= 1e-4
    assert not [e for e in learned.events if e["event"] == "fallback"]
    implicit = replace(replayed, run=str(tmp_path / "ilql"), qlearning=QLearningSection(loss="ilql"))
    steered = tether.generate(tether.qlearning(implicit).final, ["a?"], max_new_tokens=4)
    assert 1 <= len(steered[0].token_ids) <= 4

    tether.export(run, tmp_path / "exported")
    tokens = torch.arange(20)[None] * 7 % 258  # longer than the sliding windows
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    trained = policies[0].eval()
    with torch.no_grad():
        want = trained.lm(input_ids=tokens).logits
        assert_close(exported(input_ids=tokens).logits, want, atol=1e-4, rtol=1e-4)
        start = AutoModelForCausalLM.from_pretrained(imitated.final).eval()(input_ids=tokens).logits
        record_property("largest change of a logit", (want - start).abs().max().item())
        assert not torch.allclose(want, start, atol=1e-3)  # it was trained
        assert AutoModelForSequenceClassification.from_pretrained(judged.final)(tokens).logits.shape == (1, 1)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "exported")("a?", return_tensors="pt")
    answer = exported.generate(**prompt)[0, 2:].tolist()
    assert 1 <= len(answer) <= 10
    assert len(answer) == 10 or answer[-1] in STOPS
