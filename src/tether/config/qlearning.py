"""What `tether qlearning` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tether.config.keys import Section, at_least, positive, within
from tether.config.ppo import KLConfig, ModelConfig, PPOSection
from tether.config.sections import DataConfig, MicrobatchTokens, TrainingConfig
from tether.errors import ConfigError


@dataclass(frozen=True)
class ScoredConfig(DataConfig):
    """Where scored answers come from."""

    path: str | list[str]  # type: ignore[assignment]  # one or several, where other commands take one
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id, with columns prompt, completion, score; or a run
    directory of tether ppo, whose rollouts are read with their own token ids. Or a list of several of these."""
    limit: Annotated[int | None, at_least(1, "nothing would be left; null uses all")] = None
    """Use only the first so many rows of each path; null uses all."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    def check(self, key: str) -> None:
        if not self.paths:
            raise ConfigError(f"{key}.path is an empty list: there would be nothing to learn from. Name a file or run.")
        spelled: dict[str, str] = {}  # file or directory -> as it is named; a hub id is no path here
        for path in self.paths:
            read = str(Path(path).resolve()) if Path(path).exists() else path
            if read in spelled:
                other = "" if spelled[read] == path else f", once as {spelled[read]}"
                raise ConfigError(
                    f"{key}.path names {path} twice{other}: its answers would count double. Name it once; set "
                    "qlearning.epochs to see everything more often."
                )
            spelled[read] = path


@dataclass(frozen=True)
class QLearningSection(Section):
    """Q-learning from scored answers, whoever wrote them: the policy's log-probs are the advantages, the critic is V.

    Minimizes the squared soft-Bellman residual. Its minimum is PPO's own optimum, π* ∝ ref·e^(score/β), with V* as the
    critic, for any data that holds every answer often enough.
    """

    loss: Literal["bellman"] = "bellman"
    """What is minimized. bellman: the squared soft-Bellman residual, whose minimum is PPO's optimum."""
    beta: Annotated[float, positive("without a KL to the reference the best policy has no log-probs to learn")] = 0.1
    """β of the KL to the reference, reward units per nat: the smaller, the further the policy goes for a score."""
    lam: Annotated[float, within(0, 1, "residuals are summed with weights λ^k, which would grow without bound")] = 1.0
    """How far a residual reaches. 1: to the end of the answer, so that the score is felt at every token at once. 0: to
    the next token alone, whose value the critic has to learn first."""
    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 1
    """Passes over the data. What is learned does not depend on who wrote it, so more of them do no harm but to overfit
    a small file."""
    batch: Annotated[int, at_least(1, "an optimizer step would have no answers")] = 64
    """Answers in an optimizer step."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result."""


@dataclass(frozen=True)
class QLearningConfig(TrainingConfig):
    """Everything of a Q-learning run."""

    model: ModelConfig
    data: ScoredConfig
    qlearning: QLearningSection = field(default_factory=QLearningSection)

    @property
    def as_ppo(self) -> PPOSection:
        """The same rewards and advantages in PPO's words: for pages that show the arithmetic of a token."""
        section = self.qlearning
        return PPOSection(lam=section.lam, kl=KLConfig(coef=section.beta), whiten=False)

    def microbatch(self, longest: int | None) -> tuple[int, int, int]:
        width, section = longest or self.data.max_tokens, self.qlearning
        return min(section.batch, max(1, section.microbatch_tokens // width)), width, width - 1
