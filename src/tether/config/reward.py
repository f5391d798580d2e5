"""What `tether reward` takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from typing import Annotated

from tether.config.keys import Section, at_least
from tether.config.sections import DataConfig, LabelsConfig, MicrobatchTokens, TrainingConfig
from tether.errors import ConfigError


@dataclass(frozen=True)
class PairsConfig(DataConfig):
    """Where preferences come from: a file of pairs, or a store of labels (preferences.db)."""

    labels: LabelsConfig = field(default_factory=LabelsConfig)

    @classmethod
    def of(cls, data: DataConfig) -> PairsConfig:
        """A DataConfig is a PairsConfig without filters; as one it is written to YAML, and loads back equal."""
        return cls(**{f.name: getattr(data, f.name) for f in fields(data)})


@dataclass(frozen=True)
class RewardModelSection(Section):
    """Fitting a Bradley–Terry reward model to pairs."""

    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 1
    """Passes over the pairs; more than one or two overfits human labels."""
    batch: Annotated[int, at_least(1, "an optimizer step would have no pairs")] = 32
    """Pairs in an optimizer step."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result."""
    center: Annotated[float, at_least(0, "scores would be driven apart without bound")] = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores near 0."""
    test_fraction: float = 0.1
    """Share of the pairs held out for the reported accuracy; pairs with a prompt or group in common stay together (with
    an answer, where all have one prompt). 0 holds none out: nothing is then known about other pairs."""
    members: Annotated[int | None, at_least(2, "nothing could disagree; null trains one reward model")] = None
    """Train so many reward models, one after the other: an ensemble for `reward: [{models: …}]`, in final/member-1 and
    so on. Each has another seed and other pairs, drawn with replacement by prompt or group from the training side; 4 or
    5 are usual. null: one, in final/."""

    def check(self, key: str) -> None:
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"{key}.test_fraction={self.test_fraction} is outside [0, 1): without training pairs nothing can be "
                "learned. Set e.g. 0.1; 0 holds none out, and reports no accuracy."
            )


@dataclass(frozen=True)
class RewardConfig(TrainingConfig):
    """Everything of a reward-model run."""

    data: PairsConfig
    reward_model: RewardModelSection = field(default_factory=RewardModelSection)

    @property
    def member_seeds(self) -> list[int]:
        """A seed for each reward model; of the only one the run's own."""
        count = self.reward_model.members
        if count is None:
            return [self.seed]
        return [random.Random(f"{self.seed}, member {k}").getrandbits(62) for k in range(1, count + 1)]

    def __post_init__(self) -> None:
        if not isinstance(self.data, PairsConfig) and isinstance(self.data, DataConfig):
            object.__setattr__(self, "data", PairsConfig.of(self.data))

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        width, section = longest or self.data.max_tokens, self.reward_model
        return (
            min(2 * -(-section.batch // ranks), max(2, section.microbatch_tokens // width)),
            width,
            0,
        )  # only a score is read
