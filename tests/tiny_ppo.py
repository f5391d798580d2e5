"""PPO runs of a second, for tests: a random two-layer model, twelve prompts, a reward that the ids decide."""

import json
from pathlib import Path
from typing import Any

from tether.config import (
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardShapingConfig,
    SamplingConfig,
)

PROMPTS = ["a", "bc", "once upon a time", "d e", "why?", "fgh", "ij", "the end", "klm", "n", "op", "qrst"]
STOPS = list(range(2, 40))  # a seventh of the byte tokens: responses end early and unevenly; eos is not among them


def id_score(completion_ids, **_):
    """Higher ids are better: something that a run can learn."""
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def tiny_config(run: Path, policy: Path, **sections: dict[str, Any]) -> PPOConfig:
    """Four cycles of eight responses, checkpoints and evaluations every second one; `sections` override keys."""
    prompts = run.parent / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    defaults: dict[str, Any] = {
        "ppo": {"cycles": 4, "batch": 8, "responses_per_prompt": 2, "minibatch": 4, "epochs": 2},
        "sampling": {"temperature": 0.7, "max_new_tokens": 10, "stop_token_ids": STOPS},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every": 2},
        "evaluate": {"every": 2, "count": 3, "samples": 2},
        "log": {"tensorboard": False},
        "model": {"policy": str(policy)},
        "reward_shaping": {},
    }
    kinds = {
        "ppo": PPOSection, "sampling": SamplingConfig, "optim": OptimConfig, "checkpoint": CheckpointConfig,
        "evaluate": HeldOutConfig, "log": LogConfig, "model": ModelConfig, "reward_shaping": RewardShapingConfig,
    }  # fmt: skip
    built = {name: kind(**defaults[name] | sections.get(name, {})) for name, kind in kinds.items()}
    return PPOConfig(run=str(run), device="cpu", prompts=PromptsConfig(path=str(prompts)), **built)
