"""What `tether evaluate` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tether.config.keys import at_least
from tether.config.sections import (
    Config,
    Dtype,
    PromptsConfig,
    RewardShapingConfig,
    RewardSourceConfig,
    SamplingConfig,
    Seed,
    check_names,
)
from tether.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Several models on the same prompts: score, KL to the baseline, win rate against it, with intervals."""

    models: list[str]
    """Directories or hub ids to compare."""
    prompts: PromptsConfig
    reward: list[RewardSourceConfig] = field(default_factory=list)
    """Sources of the score."""
    baseline: str | None = None
    """The model that the others are compared with; null: the first of `models`."""
    run: str | None = None
    """Directory for results and answers, which the studio shows side by side; null prints the results alone."""
    samples: Annotated[int, at_least(1, "there would be nothing to score")] = 8
    """Responses to each prompt."""
    seed: Seed = 0
    """Seed of the samples and of the bootstrap."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Dtype = "auto"
    """Compute precision."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models."""
    reward_shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self, key: str) -> None:
        super().check(key)
        if isinstance(self.models, str):  # from Python; YAML is typed
            raise ConfigError(f"models is the text {self.models[:60]!r}: every letter would be a model. Give a list.")
        if not self.models:
            raise ConfigError("models is empty: there is nothing to evaluate. List at least one model directory.")
        check_names(self.reward)
