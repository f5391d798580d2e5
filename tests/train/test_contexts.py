"""A model beside the policy whose context is too short is found before the first cycle, whatever asks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tether
from tether.config import (
    EvaluateConfig,
    ModelConfig,
    RewardShapingConfig,
    RewardSourceConfig,
    SamplingConfig,
)
from tether.diagnose import dry_run
from tether.errors import ConfigError, ModelError
from tether.models.reward_model import init_reward_model, save_reward_model
from tether.train.ppo import ppo
from tiny_ppo import id_score, tiny_config

# The longest prompt is "once upon a time", 16 tokens of a byte each, and 10 more are sampled: 26 in all.
KINDS = ["reward", "model.critic", "model.reference"]


@pytest.fixture
def config_of(tiny_model, tiny_tokenizer, tmp_path):
    def make(kind: str, positions: int, tokenizer=tiny_tokenizer):
        other = tiny_model(max_position_embeddings=positions)
        if kind != "model.reference":
            model = init_reward_model(
                str(other), dtype=torch.float32, weights_dtype=torch.float32, device=torch.device("cpu"), seed=0
            )
            other = tmp_path / "other"
            save_reward_model(model, tokenizer, other, stop_id=1)
        model = ModelConfig(str(tiny_model()))
        config = tiny_config(tmp_path / "run", tiny_model(), ppo={"cycles": 1, "batch": 4, "minibatch": 4, "epochs": 1})
        if kind == "reward":
            return replace(config, model=model, reward=[RewardSourceConfig(model=str(other))])
        return replace(config, model=replace(model, **{kind.removeprefix("model."): str(other)}))

    return make


def run(config):
    return ppo(config, reward=None if config.reward else id_score)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_is_one_token_too_short_is_refused_by_the_run_and_by_the_dry_run_alike(config_of, kind):
    config = config_of(kind, 25)
    said = []
    for begin in (run, lambda c: dry_run(replace(c, reward=c.reward or [_function(c)]))):
        with pytest.raises(
            ConfigError,
            match=r"25 tokens.*16 tokens.*10.*Lower sampling.max_new_tokens to 9 or prompts.max_tokens to 15",
        ) as error:
            begin(config)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not (Path(config.run) / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["critic", "reference"])
def test_another_vocabulary_is_refused_by_the_run_and_by_the_dry_run_alike(tiny_model, tmp_path, kind):
    config = tiny_config(
        tmp_path / "run", tiny_model(), model={"policy": str(tiny_model()), kind: str(tiny_model(vocab_size=300))}
    )
    for begin in (run, lambda c: dry_run(replace(c, reward=[_function(c)]))):
        with pytest.raises(ModelError, match=rf"model\.{kind}=.* vocabulary of 300 tokens, the policy one of 258"):
            begin(config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_just_suffices_is_taken(config_of, kind):
    config = config_of(kind, 26)
    dry_run(replace(config, reward=config.reward or [_function(config)]))
    assert len(run(config).metrics) == 1


def test_a_reward_model_with_other_tokens_is_measured_in_its_own(config_of, tiny_tokenizer):
    longer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    longer.chat_template = "{{ 'x' * 90 }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = config_of("reward", 100, longer)  # 90 + 3 + 10 tokens, where the policy has less than 26
    chat = [{"prompt": [{"role": "user", "content": "abc"}]} for _ in range(4)]
    Path(config.prompts.path).write_text("".join(json.dumps(row) + "\n" for row in chat))
    with pytest.raises(ConfigError, match=r"100 tokens.*93 tokens.*10"):
        dry_run(config)


def test_evaluate_refuses_such_a_reward_model_before_it_samples(config_of, tmp_path):
    config = config_of("reward", 25)
    evaluation = EvaluateConfig(
        [config.model.policy], config.prompts, config.reward, samples=1, device="cpu",
        sampling=SamplingConfig(max_new_tokens=10), reward_shaping=RewardShapingConfig(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"25 tokens.*16 tokens.*10"):
        tether.evaluate(evaluation)


def _function(config) -> RewardSourceConfig:
    file = Path(config.run).parent / "ids.py"
    file.write_text("def flat(completion_ids, **_):\n    return [0.0] * len(completion_ids)\n")
    return RewardSourceConfig(function=f"{file}:flat")
