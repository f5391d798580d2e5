"""What `tether ppo` takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from tether.config.keys import Section, at_least, positive, within
from tether.config.sections import (
    MicrobatchTokens,
    PromptsConfig,
    ReferencedModelConfig,
    RewardShapingConfig,
    RewardSourceConfig,
    SamplingConfig,
    TrainingConfig,
    check_groups,
    check_names,
    check_not_pairwise,
    check_warmup,
    identities,
)
from tether.errors import ConfigError

_LAM = within(0, 1, "GAE weights the k-step advantages by λ^k, which would grow without bound")
_CLIP = positive("every ratio would be clipped and nothing learned")


@dataclass(frozen=True)
class ModelConfig(ReferencedModelConfig):
    """Which model learns, in which precision, and the models beside it."""

    critic: str = "shared"
    """shared: a value head on the policy's trunk (one forward pass for both). separate: a trunk of its own, copied from
    the policy. A directory: a trunk of its own from there; a reward model's head comes along."""


@dataclass(frozen=True)
class KLConfig(Section):
    """The leash to the reference."""

    coef: Annotated[float, at_least(0, "the policy would be paid for leaving the reference")] = 0.05
    """β: reward units per nat. With a target, only the start."""
    target: Annotated[float | None, positive("a KL of 0 is the untrained model")] = None
    """KL to hold, in nats per response, by adapting β; null keeps β."""
    horizon: Annotated[float | None, positive("β would jump by any amount")] = None
    """null: β moves as fast as the target takes. A number: by 20 % at most over so many responses (Ziegler 2019)."""
    place: Literal["reward", "loss"] = "reward"
    """reward: k1 in every token's reward, the one with the right optimum. loss: k2 in the loss."""

    def check(self, key: str) -> None:
        if self.target is not None and self.coef == 0:
            raise ConfigError(
                f"{key}.coef={self.coef} is not above 0: an adaptive β moves by factors and would stay 0. Set "
                f"{key}.coef to a positive number."
            )


@dataclass(frozen=True)
class PPOSection(Section):
    """The algorithm."""

    cycles: Annotated[int, at_least(1, "nothing would be trained")] = 200
    """Cycles of rollout and update."""
    batch: Annotated[int, at_least(1, "a cycle would have no responses")] = 64
    """Responses a cycle."""
    responses_per_prompt: Annotated[int, at_least(1, "no prompt would be answered")] = 1
    """Responses to each prompt; 2 or more let the optimality gap be measured."""
    epochs: Annotated[int, at_least(1, "nothing would be learned from a cycle")] = 4
    """Passes over a cycle's responses."""
    minibatch: Annotated[int, at_least(1, "an optimizer step would have no responses")] = 16
    """Responses an optimizer step; divides batch."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result, only memory and speed."""
    advantage: Literal["gae", "group", "batch"] = "gae"
    """What a response is compared with. gae: the critic's expectation, token by token. group: the others to its
    prompt (RLOO); batch: the cycle's mean (REINFORCE++). Neither of these has a critic: one model less to train and to
    hold, and one advantage for all tokens of a response."""
    group_std: bool = False
    """Divide a group's advantages by its deviation (GRPO). Off: with it, the objective is another one."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """clip: PPO's, a token past the clip has no gradient. cispo: its weight is bounded instead (MiniMax-M1)."""
    gamma: Annotated[float, within(0, 1, "future rewards would grow with distance")] = 1.0
    """Discount γ a token; 1: a response is short and its score is what counts."""
    lam: Annotated[float, _LAM] = 0.95
    """λ of GAE."""
    critic_lam: Annotated[float | None, _LAM] = None
    """λ of the returns that the critic learns (VC-PPO, arXiv:2503.01491); null: lam. 1 is Monte Carlo: no bias from a
    critic that is still wrong."""
    whiten: bool | None = None
    """Bring a cycle's advantages to mean 0 and variance 1. null: yes for gae and batch; not for group, where at the
    optimum every advantage is 0 and whitening would blow up what is left, the noise."""
    clip: Annotated[float, _CLIP] = 0.2
    """ε of the ratio's clip: the ratio stays above 1 - ε, and below 1 + ε unless clip_high is set."""
    clip_high: Annotated[float | None, _CLIP] = None
    """ε of the upper side alone; null: clip. 0.28 beside a clip of 0.2 lets unlikely tokens rise faster (DAPO)."""
    value_clip: Annotated[float | None, positive("values could never move; null turns the clip off")] = 0.2
    """Values move at most this far from the old ones before the loss stops rewarding it; null: no clip."""
    value_coef: Annotated[float, at_least(0, "the critic would be driven away from the returns")] = 0.1
    """c1: weight of the value loss."""
    entropy_coef: Annotated[float, at_least(0, "entropy would be minimized")] = 0.0
    """c2: weight of the entropy bonus."""
    kl: KLConfig = field(default_factory=KLConfig)
    stop_epoch_at_kl: Annotated[float | None, positive("every cycle would stop at once; null turns it off")] = None
    """Leave a cycle's epochs when KL(old‖new), nats per token, passes this; null: never."""
    value_warmup_cycles: Annotated[int, at_least(0, "a count of cycles cannot be negative")] = 0
    """First cycles in which only the critic learns and a shared trunk is frozen."""
    ahead: Literal[0, 1] = 0
    """1: sample the next cycle's responses while this one is learned from, by the policy of one update before, and
    weigh their tokens for it. Pays where sampling runs on other hardware than learning."""
    ahead_cap: Annotated[float, at_least(1, "tokens that the policy has come to like would not count in full")] = 2.0
    """Largest weight of a token that was sampled ahead (truncated importance sampling): it bounds what one token that
    has become likelier can do."""

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps in a cycle, unless stop_epoch_at_kl leaves some out."""
        return self.epochs * (self.batch // self.minibatch)

    @property
    def steps(self) -> int:
        """Those of the run."""
        return self.cycles * self.steps_per_cycle

    @property
    def clips(self) -> tuple[float, float]:
        """ε below and above 1."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def whitens(self) -> bool:
        return self.advantage != "group" if self.whiten is None else self.whiten

    @property
    def lams(self) -> tuple[float, float]:
        """λ of the advantages and of the returns."""
        return self.lam, self.lam if self.critic_lam is None else self.critic_lam

    def check(self, key: str) -> None:
        if self.batch % self.minibatch:
            raise ConfigError(
                f"{key}.minibatch={self.minibatch} does not divide {key}.batch={self.batch}: the last "
                f"{self.batch % self.minibatch} responses of every cycle would never be trained on. Set "
                f"{key}.minibatch to a divisor of {self.batch}."
            )
        if self.batch % self.responses_per_prompt:
            raise ConfigError(
                f"{key}.responses_per_prompt={self.responses_per_prompt} does not divide {key}.batch={self.batch}: one "
                f"prompt would get fewer responses than the others. Set it to a divisor of {self.batch}."
            )
        if self.clip >= 1:
            raise ConfigError(
                f"{key}.clip={self.clip}: the lower ratio bound 1 - {self.clip} is not above 0, so it would never "
                f"bind. Set {key}.clip below 1; {key}.clip_high may be larger."
            )
        horizon = self.kl.horizon
        if self.kl.target is not None and horizon is not None and self.batch >= 5 * horizon:
            raise ConfigError(
                f"{key}.kl.horizon={horizon:g} is too short for {key}.batch={self.batch}: β changes by up to "
                f"20 % a horizon, so one cycle could make it zero or negative. Set {key}.kl.horizon above "
                f"{self.batch / 5:g}, better above {self.batch}."
            )
        if self.advantage == "group" and self.responses_per_prompt < 2:
            raise ConfigError(
                f"{key}.responses_per_prompt={self.responses_per_prompt} with {key}.advantage=group: a response would "
                f"have no other to be compared with, and nothing would be learned. Set {key}.responses_per_prompt to 2 "
                "or more; 4 to 8 are usual."
            )
        if self.group_std and self.advantage != "group":
            raise ConfigError(
                f"{key}.group_std=true with {key}.advantage={self.advantage}: there are no groups to take a deviation "
                f"of. Set {key}.advantage to group, or leave group_std out."
            )
        if not self.has_critic:
            self._check_that_nothing_needs_a_critic(key)
        if not self.ahead and self.ahead_cap != type(self).ahead_cap:
            raise ConfigError(
                f"{key}.ahead_cap={self.ahead_cap} with {key}.ahead=0: nothing is sampled ahead, so it would be "
                f"ignored. Leave it out, or set {key}.ahead to 1."
            )
        if self.value_warmup_cycles >= self.cycles:
            raise ConfigError(
                f"{key}.value_warmup_cycles={self.value_warmup_cycles} is not below {key}.cycles={self.cycles}: the "
                "policy would never learn. Set fewer warm-up cycles or more cycles."
            )

    def _check_that_nothing_needs_a_critic(self, key: str) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if field_.name in _OF_THE_CRITIC and value != field_.default:
                raise ConfigError(
                    f"{key}.{field_.name}={value} with {key}.advantage={self.advantage}: only gae and its critic read "
                    f"it, so it would be ignored. Leave it out, or set {key}.advantage to gae."
                )


_OF_THE_CRITIC = ("gamma", "lam", "critic_lam", "value_clip", "value_coef", "value_warmup_cycles")


@dataclass(frozen=True)
class HeldOutConfig(Section):
    """Evaluation during training."""

    every: Annotated[int, at_least(0, "0 already means never")] = 10
    """Cycles between evaluations; 0: none."""
    prompts: str | None = None
    """File of prompts, none of which is trained on; null: `count` prompts held out of `prompts`."""
    count: Annotated[int, at_least(1, "there would be nothing to evaluate; evaluate.every 0 turns it off")] = 16
    """Prompts, the same through the whole run so that one sees them learn."""
    samples: Annotated[int, at_least(1, "there would be nothing to evaluate; evaluate.every 0 turns it off")] = 4
    """Responses to each."""
    gold: list[RewardSourceConfig] = field(default_factory=list)
    """Sources that score these responses and nothing else: they are neither summed nor trained on, and tell whether the
    score is still worth what it says. best/ is then the policy with the highest mean of the first of them."""
    stop_when_gold_falls: Annotated[int | None, at_least(1, "the run would end at once; null never ends it")] = None
    """End the run once so many evaluations in a row lie below the best by gold: the 95 % interval of the difference,
    prompt by prompt, is below 0 for each. null: never. 2 or 3 are usual."""

    def check(self, key: str) -> None:
        if self.gold and not self.every:
            raise ConfigError(
                f"{key}.gold is given with {key}.every=0: nothing would be evaluated, and gold never asked. Set "
                f"{key}.every to 1 or more."
            )
        if self.stop_when_gold_falls is not None and not self.gold:
            raise ConfigError(
                f"{key}.stop_when_gold_falls={self.stop_when_gold_falls} without {key}.gold: there is nothing to fall. "
                f"Add a source to {key}.gold, or leave it out."
            )
        for i, source in enumerate(self.gold):
            for name in ("weight", "optional"):
                if getattr(source, name) != getattr(type(source), name):
                    raise ConfigError(
                        f"{key}.gold[{i}].{name} is set: gold is not summed, and answers every response, so it would "
                        "be ignored. Leave it out."
                    )
        check_names(self.gold, f"{key}.gold")
        check_not_pairwise(self.gold, f"{key}.gold")


@dataclass(frozen=True)
class PPOConfig(TrainingConfig):
    """Everything of a PPO run."""

    model: ModelConfig
    prompts: PromptsConfig
    reward: list[RewardSourceConfig] = field(default_factory=list)
    """Sources of the score, summed by weight; may be empty only when tether.ppo gets reward=fn."""
    reward_shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOSection = field(default_factory=PPOSection)
    evaluate: HeldOutConfig = field(default_factory=HeldOutConfig)

    def check(self, key: str) -> None:
        super().check(key)
        check_names(self.reward)
        groups = {"ppo.responses_per_prompt": self.ppo.responses_per_prompt}
        groups |= {"evaluate.samples": self.evaluate.samples} if self.evaluate.every else {}
        check_groups(self.reward, groups)
        trained_on = {what: i for i, source in enumerate(self.reward) for what in identities(source)}
        for i, source in enumerate(self.evaluate.gold):
            if same := identities(source) & trained_on.keys():
                where = f"reward[{trained_on[same.pop()]}]"
                raise ConfigError(
                    f"evaluate.gold[{i}] is what {where} scores by: the policy learns to please it, so it could not "
                    "tell when that stops being good. Name a source that is not trained on."
                )
        if not self.ppo.has_critic and self.model.critic != "shared":
            raise ConfigError(
                f"model.critic={self.model.critic} with ppo.advantage={self.ppo.advantage}: nothing would use the "
                "critic. Leave model.critic out, or set ppo.advantage to gae."
            )
        check_warmup(self.optim, self.ppo.steps)

    @property
    def steps_per_unit(self) -> int:
        return self.ppo.steps_per_cycle

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        new = self.sampling.max_new_tokens
        width = (longest or self.prompts.max_tokens) + new
        return min(-(-self.ppo.minibatch // ranks), max(1, self.ppo.microbatch_tokens // width)), width, new
