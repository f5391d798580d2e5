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
    check_local_engine,
    check_names,
    check_not_pairwise,
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
    best_of: Annotated[list[int] | None, at_least(1, "there would be no answer to choose")] = None
    """Score and KL of choosing the best of n answers of the baseline, for each n of the list: what can be had without
    training. null: 1, 2, 4, … up to `samples` (for 8 samples [1, 2, 4, 8]); [] : none."""
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
        too_many = [n for n in self.best_of or () if n > self.samples]
        if too_many:
            raise ConfigError(
                f"best_of holds {too_many[0]}, but there are samples={self.samples} responses to each prompt: the best "
                f"of {too_many[0]} cannot be estimated from them. Set samples to {max(too_many)} or more, or leave "
                f"{', '.join(map(str, too_many))} out of best_of."
            )
        check_local_engine(self.sampling, "tether evaluate")
        check_names(self.reward)
        check_not_pairwise(self.reward, "reward")

    @property
    def best_of_sizes(self) -> list[int]:
        """Every n of `best_of`, ascending."""
        if self.best_of is None:
            return [2**i for i in range(self.samples.bit_length())]
        return sorted(set(self.best_of))
