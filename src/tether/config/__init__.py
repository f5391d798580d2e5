"""What a run is made of: sections, one file a command, the table of kinds, and how YAML, flags and --help meet them.

Loads no torch, and pydantic and ruamel.yaml only with `reading`.
"""

from tether.config.dpo import DPOConfig, DPOSection
from tether.config.evaluate import EvaluateConfig
from tether.config.judge import AskedModelConfig, JudgeConfig, JudgedConfig, JudgeSection, LimitsConfig
from tether.config.keys import Section
from tether.config.ppo import HeldOutConfig, KLConfig, ModelConfig, PPOConfig, PPOSection
from tether.config.qlearning import ILQLSection, QLearningConfig, QLearningSection, ScoredConfig
from tether.config.revise import ReviseConfig, RevisedDataConfig, RevisedSamplingConfig, ReviseSection
from tether.config.reward import PairsConfig, RewardConfig, RewardModelSection
from tether.config.sections import (
    RESERVED_NAMES,
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    InitModelConfig,
    LabelsConfig,
    LogConfig,
    LoraConfig,
    MissingEosConfig,
    OptimConfig,
    PoolConfig,
    PromptsConfig,
    ReferencedModelConfig,
    RewardShapingConfig,
    RewardSourceConfig,
    SamplingConfig,
    SFTModelConfig,
    TrainingConfig,
    VLLMConfig,
    WandbConfig,
    check,
    check_warmup,
    model_paths,
    source_name,
)
from tether.config.sft import SFTConfig, SFTSection

__all__ = [
    "RESERVED_NAMES",
    "AskedModelConfig",
    "CheckpointConfig",
    "Config",
    "DPOConfig",
    "DPOSection",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "HeldOutConfig",
    "ILQLSection",
    "InitModelConfig",
    "JudgeConfig",
    "JudgeSection",
    "JudgedConfig",
    "KLConfig",
    "LabelsConfig",
    "LimitsConfig",
    "LogConfig",
    "LoraConfig",
    "MissingEosConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOSection",
    "PairsConfig",
    "PoolConfig",
    "PromptsConfig",
    "QLearningConfig",
    "QLearningSection",
    "ReferencedModelConfig",
    "ReviseConfig",
    "ReviseSection",
    "RevisedDataConfig",
    "RevisedSamplingConfig",
    "RewardConfig",
    "RewardModelSection",
    "RewardShapingConfig",
    "RewardSourceConfig",
    "SFTConfig",
    "SFTModelConfig",
    "SFTSection",
    "SamplingConfig",
    "ScoredConfig",
    "Section",
    "TrainingConfig",
    "VLLMConfig",
    "WandbConfig",
    "check",
    "check_warmup",
    "model_paths",
    "source_name",
]
