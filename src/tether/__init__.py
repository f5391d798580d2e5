"""Align a language model with human preferences: people compare, a reward model learns, PPO improves, they look again.

    config = tether.load_config("ppo.yaml")
    run = tether.ppo(config)                       # or tether.ppo(config, reward=my_function)
    tether.report(run.path)

Every name below is loaded when it is first used, so that `import tether` costs nothing and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.config import (
        DPOConfig,
        EvaluateConfig,
        JudgeConfig,
        PPOConfig,
        QLearningConfig,
        ReviseConfig,
        RewardConfig,
        SFTConfig,
    )
    from tether.config.reading import load_config
    from tether.errors import (
        BatchError,
        ConfigError,
        DataError,
        EngineError,
        Interrupted,
        LabelError,
        ModelError,
        RewardError,
        RunError,
        StoreError,
        TetherError,
        TrainingError,
    )
    from tether.feedback.judge import judge
    from tether.feedback.revise import revise
    from tether.models.export import export
    from tether.reports.page import report
    from tether.runs import Run
    from tether.train.dpo import dpo
    from tether.train.evaluate import evaluate, generate
    from tether.train.ppo import ppo
    from tether.train.qlearning import qlearning
    from tether.train.rejection_sampling import best_of_n
    from tether.train.reward import reward_model
    from tether.train.sft import sft

_HOME = {
    "ppo": "tether.train.ppo",
    "sft": "tether.train.sft",
    "qlearning": "tether.train.qlearning",
    "reward_model": "tether.train.reward",
    "dpo": "tether.train.dpo",
    "evaluate": "tether.train.evaluate",
    "judge": "tether.feedback.judge",
    "revise": "tether.feedback.revise",
    "generate": "tether.train.evaluate",
    "best_of_n": "tether.train.rejection_sampling",
    "export": "tether.models.export",
    "report": "tether.reports.page",
    "load_config": "tether.config.reading",
    "Run": "tether.runs",
    **dict.fromkeys(
        ("PPOConfig", "SFTConfig", "RewardConfig", "DPOConfig", "QLearningConfig", "EvaluateConfig", "JudgeConfig",
         "ReviseConfig"),
        "tether.config",
    ),
    **dict.fromkeys(
        ("TetherError", "ConfigError", "DataError", "ModelError", "RewardError", "RunError", "StoreError",
         "LabelError", "BatchError", "TrainingError", "EngineError", "Interrupted"),
        "tether.errors",
    ),
}  # fmt: skip

__all__ = [
    "BatchError",
    "ConfigError",
    "DPOConfig",
    "DataError",
    "EngineError",
    "EvaluateConfig",
    "Interrupted",
    "JudgeConfig",
    "LabelError",
    "ModelError",
    "PPOConfig",
    "QLearningConfig",
    "ReviseConfig",
    "RewardConfig",
    "RewardError",
    "Run",
    "RunError",
    "SFTConfig",
    "StoreError",
    "TetherError",
    "TrainingError",
    "__version__",
    "best_of_n",
    "dpo",
    "evaluate",
    "export",
    "generate",
    "judge",
    "load_config",
    "ppo",
    "qlearning",
    "report",
    "revise",
    "reward_model",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("tether")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tether' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
