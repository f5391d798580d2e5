"""Every default is the one that was promised: this page was written by hand, not printed by the code."""

import pytest
import yaml

from tether.config import DPOConfig, EvaluateConfig, JudgeConfig, PPOConfig, QLearningConfig, RewardConfig, SFTConfig
from tether.config.keys import keys
from tether.config.kinds import KINDS
from tether.config.reading import load_config, to_yaml

PPO = """
run: r
seed: 0
device: auto
deterministic: false
model: {policy: m, critic: shared, reference: null, lora: null, dtype: auto, gradient_checkpointing: auto,
        revision: null, trust_remote_code: false}
prompts: {path: p, split: train, max_tokens: 512, overlong: error, limit: null, chat_template_kwargs: {}}
reward:
  - {function: "f.py:f", model: null, models: null, pessimism: 0.5, url: null, judge: null, form: null,
     weight: 1.0, name: null, timeout_s: 60.0, dtype: auto, arguments: {}, optional: false, key_env: null, probe: true}
reward_shaping: {clip: null, missing_eos: null}
sampling: {engine: local, temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 64, stop_token_ids: null, slots: auto,
           vllm: {python: null, dtype: auto, arguments: {}},
           pool: {workers: 2, cpus: 1, gpus: 0.0, address: null, timeout_s: 120.0}}
ppo:
  cycles: 200
  batch: 64
  responses_per_prompt: 1
  epochs: 4
  minibatch: 16
  microbatch_tokens: 8192
  advantage: gae
  group_std: false
  surrogate: clip
  gamma: 1.0
  lam: 0.95
  critic_lam: null
  whiten: null
  clip: 0.2
  clip_high: null
  value_clip: 0.2
  value_coef: 0.1
  entropy_coef: 0.0
  kl: {coef: 0.05, target: null, horizon: null, place: reward}
  stop_epoch_at_kl: null
  value_warmup_cycles: 0
  ahead: 0
  ahead_cap: 2.0
optim: {lr: null, critic_lr: null, schedule: linear, warmup: 0, betas: [0.9, 0.95], eps: 1.0e-5, weight_decay: 0.0,
        max_grad_norm: 1.0}
log: {rollouts_every: 1, tensorboard: true, wandb: null}
checkpoint: {every: 50, keep: 2}
distributed: {shard: auto, reduce: float32, timeout_s: 1800.0}
evaluate: {every: 10, prompts: null, count: 16, samples: 4, gold: [], stop_when_gold_falls: null}
"""

SFT = """
run: r
seed: 0
device: auto
deterministic: false
model: {policy: m, lora: null, dtype: auto, gradient_checkpointing: auto, revision: null, trust_remote_code: false}
data: {path: d, split: train, max_tokens: 512, overlong: error, limit: null, chat_template_kwargs: {}}
sft: {epochs: 1, batch: 32, microbatch_tokens: 8192, packing: false, train_on: completion}
optim: {lr: null, critic_lr: null, schedule: linear, warmup: 0, betas: [0.9, 0.95], eps: 1.0e-5, weight_decay: 0.0,
        max_grad_norm: 1.0}
log: {rollouts_every: 1, tensorboard: true, wandb: null}
checkpoint: {every: 50, keep: 2}
distributed: {shard: auto, reduce: float32, timeout_s: 1800.0}
"""

REWARD = (
    SFT.replace("chat_template_kwargs: {}}", "chat_template_kwargs: {}, labels: *}")
    .replace("*", "{annotators: null, since: null, until: null, guideline: null, judges: false}")
    .replace(
        "sft: {epochs: 1, batch: 32, microbatch_tokens: 8192, packing: false, train_on: completion}",
        "reward_model: {epochs: 1, batch: 32, microbatch_tokens: 8192, center: 0.0, test_fraction: 0.1, members: null}",
    )
)

DPO = REWARD.replace("policy: m", "policy: m, reference: null").replace(
    "reward_model: {epochs: 1, batch: 32, microbatch_tokens: 8192, center: 0.0, test_fraction: 0.1, members: null}",
    "dpo: {loss: sigmoid, beta: 0.1, gamma: 0.0, flipped: 0.0, smoothing: 0.0, average: false, nll: 0.0, epochs: 1, "
    "batch: 32, test_fraction: 0.1, microbatch_tokens: 8192}",
)

QLEARNING = (
    SFT.replace("policy: m,", "policy: m, critic: shared, reference: null,")
    .replace("sft: {epochs: 1, batch: 32", "qlearning: {loss: bellman, beta: 0.1, lam: 1.0, epochs: 1, batch: 64")
    .replace(", packing: false, train_on: completion", "")
    .replace(
        "batch: 64, microbatch_tokens: 8192",
        "batch: 64, microbatch_tokens: 8192, ilql: {tau: 0.8, gamma: 0.99, cql: 0.1, awac: 1.0, polyak: 0.1, "
        "sync_every: 5, strength: 10.0, top_k: 10}",
    )
)

EVALUATE = """
models: [m]
baseline: null
run: null
samples: 8
best_of: null
seed: 0
device: auto
dtype: auto
trust_remote_code: false
prompts: {path: p, split: train, max_tokens: 512, overlong: error, limit: null, chat_template_kwargs: {}}
reward:
  - {function: "f.py:f", model: null, models: null, pessimism: 0.5, url: null, judge: null, form: null,
     weight: 1.0, name: null, timeout_s: 60.0, dtype: auto, arguments: {}, optional: false, key_env: null, probe: true}
reward_shaping: {clip: null, missing_eos: null}
sampling: {engine: local, temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 64, stop_token_ids: null, slots: auto,
           vllm: {python: null, dtype: auto, arguments: {}},
           pool: {workers: 2, cpus: 1, gpus: 0.0, address: null, timeout_s: 120.0}}
"""

JUDGE = """
judge: {model: m, base_url: null, key_env: null, name: null, constitution: helpful, orders: both, votes: 1,
        answer: auto, answer_tokens: 512}
data: {path: d, limit: null}
to: null
limits: {requests: null, tokens: null, concurrency: 8, timeout_s: 60.0, retries: 5}
seed: 0
device: auto
dtype: auto
trust_remote_code: false
"""

LEAST = {
    "ppo": "{run: r, model: {policy: m}, prompts: {path: p}, reward: [{function: 'f.py:f'}], ppo: {}}",
    "sft": "{run: r, model: {policy: m}, data: {path: d}, sft: {}}",
    "reward": "{run: r, model: {policy: m}, data: {path: d}, reward_model: {}}",
    "dpo": "{run: r, model: {policy: m}, data: {path: d}, dpo: {}}",
    "qlearning": "{run: r, model: {policy: m}, data: {path: d}, qlearning: {}}",
    "evaluate": "{models: [m], prompts: {path: p}, reward: [{function: 'f.py:f'}]}",
    "judge": "{judge: {model: m}, data: {path: d}}",
}


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("ppo", PPO),
        ("sft", SFT),
        ("reward", REWARD),
        ("dpo", DPO),
        ("qlearning", QLEARNING),
        ("evaluate", EVALUATE),
        ("judge", JUDGE),
    ],
    ids=str,
)
def test_the_least_config_has_exactly_the_promised_keys_and_defaults(tmp_path, kind, whole):
    path = tmp_path / "least.yaml"
    path.write_text(LEAST[kind])
    assert yaml.safe_load(to_yaml(load_config(path))) == yaml.safe_load(whole)


def test_defaults_inside_optional_parts(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(LEAST["ppo"].replace("policy: m", "policy: m, lora: {}"))
    config = load_config(path)
    assert (config.model.lora.rank, config.model.lora.alpha, config.model.lora.targets) == (16, 32.0, "all-linear")
    assert (config.ppo.lams, config.ppo.clips) == ((0.95, 0.95), (0.2, 0.2))


@pytest.mark.parametrize(
    "cls", [PPOConfig, SFTConfig, RewardConfig, DPOConfig, QLearningConfig, EvaluateConfig, JudgeConfig]
)
def test_configs_are_frozen(cls):
    assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_help_text(kind):
    assert [key.name for key in keys(KINDS[kind].config) if not key.help] == []
