"""What `tether qlearning` takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from tether.config.keys import Section, at_least, positive, within
from tether.config.ppo import KLConfig, ModelConfig, PPOSection
from tether.config.sections import DataConfig, MicrobatchTokens, TrainingConfig
from tether.errors import ConfigError

_EXPECTILE = within(
    0, 1, "at 0 or 1 half of the errors would weigh nothing, and V would run off to the other side",
    "Set {key} e.g. to 0.7 to 0.9.", ends="()",
)  # fmt: skip


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
class ILQLSection(Section):
    """Of loss ilql, implicit Q-learning (Snell et al. 2022): heads V and Q beside a model that imitates the data, which
    steer it when it is sampled from. Defaults: trlX's for random walks, which it samples at strengths 1 and 100;
    10 is 1/β of the other losses."""

    tau: Annotated[float, _EXPECTILE] = 0.8
    """τ of the expectile that V is of Q. 0.5: the value of whoever wrote the data; towards 1: of the best tokens in it,
    lucky ones included."""
    gamma: Annotated[float, within(0, 1, "the future would count for more the further off it is")] = 0.99
    """Discount γ per token; below 1 an early score is worth more."""
    cql: Annotated[float, at_least(0, "tokens that the data lacks would be taken for the best ones")] = 0.1
    """Weight of the cross-entropy that keeps Q low for tokens that the data lacks (CQL)."""
    awac: Annotated[float, at_least(0, "the model would unlearn the data")] = 1.0
    """Weight of the language model's own cross-entropy: it imitates the data, good answers and bad ones alike."""
    polyak: Annotated[
        float, within(0, 1, "targets would stand still, or overshoot", "Set {key} above 0, up to 1.", ends="(]")
    ] = 0.1
    """α: how far the targets move towards the two Q at each sync; 1 copies them."""
    sync_every: Annotated[int, at_least(1, "the targets would never be synced")] = 5
    """Optimizer steps from one sync of the targets to the next."""
    strength: Annotated[float, at_least(0, "the worst tokens would be preferred")] = 10.0
    """Nats per unit of min Q̄ - V that are added to the log-probs when the final model is sampled from; 0: the language
    model alone. No loss reads it: tether generate --strength tries another without training."""
    top_k: Annotated[int, at_least(0, "0 already keeps every token")] = 10
    """Sampling chooses among the k likeliest tokens of the language model, since Q knows little of others; 0: all."""


@dataclass(frozen=True)
class QLearningSection(Section):
    """Q-learning from scored answers, whoever wrote them.

    bellman: the policy's log-probs are the advantages, the critic is V. Its minimum is PPO's own optimum,
    π* ∝ ref·e^(score/β), with V* as the critic, for any data that holds every answer often enough. ilql has no such
    optimum: what it rests at depends on τ and on who wrote the data.
    """

    loss: Literal["bellman", "ilql"] = "bellman"
    """What is minimized. bellman: the squared soft-Bellman residual, whose minimum is PPO's optimum; the final model is
    the policy. ilql: implicit Q-learning, which improves on the data's tokens without a reference; it has no
    KL-regularized optimum, and its final model is a language model with heads that only Tether's sampler reads."""
    beta: Annotated[float, positive("without a KL to the reference the best policy has no log-probs to learn")] = 0.1
    """bellman: β of the KL to the reference, reward units per nat: the smaller, the further the policy goes for a
    score."""
    lam: Annotated[float, within(0, 1, "residuals are summed with weights λ^k, which would grow without bound")] = 1.0
    """bellman: how far a residual reaches. 1: to the end of the answer, so that the score is felt at every token.
    0: to the next token alone, whose value the critic has to learn first."""
    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 1
    """Passes over the data. What bellman learns does not depend on who wrote it, so more of them do no harm but to
    overfit a small file."""
    batch: Annotated[int, at_least(1, "an optimizer step would have no answers")] = 64
    """Answers in an optimizer step."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result."""
    ilql: ILQLSection = field(default_factory=ILQLSection)

    def check(self, key: str) -> None:
        if self.loss == "ilql":
            unread = {name: getattr(self, name) for name in _OF_BELLMAN}
            defaults: Section = QLearningSection()
        else:
            unread = {f"ilql.{f.name}": getattr(self.ilql, f.name) for f in fields(self.ilql)}
            defaults = ILQLSection()
        for name, value in unread.items():
            if value != getattr(defaults, name.rpartition(".")[2]):
                other = "bellman" if self.loss == "ilql" else "ilql"
                raise ConfigError(
                    f"{key}.{name}={value} with {key}.loss={self.loss}, which does not read it: it would be ignored. "
                    f"Leave it out, or set {key}.loss to {other}."
                )


_OF_BELLMAN = ("beta", "lam")


@dataclass(frozen=True)
class QLearningConfig(TrainingConfig):
    """Everything of a Q-learning run."""

    model: ModelConfig
    data: ScoredConfig
    qlearning: QLearningSection = field(default_factory=QLearningSection)

    def check(self, key: str) -> None:
        super().check(key)
        if not self.has_heads:
            return
        for name, why in (("reference", "which has no reference"), ("critic", "whose critic is its own head V")):
            value = getattr(self.model, name)
            if value not in (None, "shared"):
                raise ConfigError(
                    f"model.{name}={value} with qlearning.loss=ilql, {why}: it would be ignored. Leave it out, or set "
                    "qlearning.loss to bellman."
                )

    @property
    def has_heads(self) -> bool:
        """Whether V and Q are heads of their own, and no reference is measured to."""
        return self.qlearning.loss == "ilql"

    @property
    def as_ppo(self) -> PPOSection:
        """The same rewards and advantages in PPO's words: for pages that show the arithmetic of a token."""
        section = self.qlearning
        if self.has_heads:
            return PPOSection(gamma=section.ilql.gamma, kl=KLConfig(coef=0.0, place="loss"), whiten=False)
        return PPOSection(lam=section.lam, kl=KLConfig(coef=section.beta), whiten=False)

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        width, section = longest or self.data.max_tokens, self.qlearning
        return min(-(-section.batch // ranks), max(1, section.microbatch_tokens // width)), width, width - 1
