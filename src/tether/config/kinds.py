"""The kinds of run: one row a command that takes a config.

cli, help, runs, diagnose, report and studio read these rows; none of them names a command. A new trainer is a row here,
a config, and a file in train/ with what the row names. Loads no torch: what is named is imported when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from tether.config.dpo import DPOConfig
from tether.config.evaluate import EvaluateConfig
from tether.config.judge import JudgeConfig
from tether.config.ppo import PPOConfig
from tether.config.qlearning import QLearningConfig
from tether.config.revise import ReviseConfig
from tether.config.reward import RewardConfig
from tether.config.sections import Config, TrainingConfig
from tether.config.sft import SFTConfig

_OF_ANY_RUN = ("not_finite", "skipped_steps", "gradient_norm", "stale", "recorded")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is particular to one command."""

    command: str
    """`tether COMMAND`; status.json holds it as `kind`."""
    title: str
    """As in the middle of a sentence."""
    purpose: str
    """One sentence, for help."""
    config: type[Config]
    section: str
    """The key of a YAML file that marks it as this command's."""
    run: str
    """module:function that takes the config."""
    inputs: str
    """module:function of config and hashes (`hashes`; {} for a new run) that reads the data as the run would and
    returns `tether.diagnose.inputs.Inputs`, for --dry-run."""
    hashes: str = "tether.train.sft:input_hashes"
    """module:function of config that hashes what a run reads, by key: it continues only on the same."""
    memory: str | None = None
    """module:function of a `tether.diagnose.memory.Trained` that gives what takes memory beside the trained model."""
    total: str | None = None
    """The key that says how many cycles there are: it may grow."""
    unit: Literal["cycle", "step"] = "step"
    headline: tuple[tuple[str, str, str], ...] = ()
    """What a run is judged by: label, metric, note. The first is the small curve in the studio's list."""
    losses: tuple[str, ...] = ()
    """Metrics of which every value has to be a finite number."""
    alarms: tuple[str, ...] = _OF_ANY_RUN
    """Rules of tether.diagnose.rules, by name."""
    curves: str | None = None
    """module:name of the report's curves: a list, or a function of config and metrics. None: the headline's metrics."""
    report: str | None = None
    """File in the run directory with what it learned of held-out pairs, see `tether.train.preference_report`."""
    page: str | None = None
    """module:function of what the report says at its top. None: the headline."""
    final: Literal["language model", "classifier"] = "language model"
    """What final/ holds."""
    many: bool = False
    """Whether torchrun may start it on several processes."""
    probe: str | None = None
    """module:function of config that tries out what it names, for `tether doctor C.yaml`; returns what it found."""
    tried: bool = False
    """The studio's "Try it" sets its final model beside the one that it began from."""

    @property
    def trains(self) -> bool:
        """Whether it writes a run directory, which can be continued."""
        return issubclass(self.config, TrainingConfig)

    @property
    def heading(self) -> str:
        """The title with a capital."""
        return self.title[:1].upper() + self.title[1:]


KINDS: dict[str, Kind] = {
    kind.command: kind
    for kind in (
        Kind(
            command="sft",
            title="supervised fine-tuning",
            purpose="Teach a model to imitate examples.",
            config=SFTConfig,
            section="sft",
            run="tether.train.sft:sft",
            inputs="tether.diagnose.inputs:of_examples",
            many=True,
            headline=(("loss", "loss", "nats per token"),),
            losses=("loss",),
            alarms=("not_finite", "skipped_steps", "loss_rising", "gradient_norm", "stale", "recorded"),
            curves="tether.reports.curves:SFT",
            page="tether.reports.page:sft_page",
        ),
        Kind(
            command="reward",
            title="reward model",
            purpose="Fit a reward model to preferred and rejected completions.",
            config=RewardConfig,
            section="reward_model",
            run="tether.train.reward:reward_model",
            inputs="tether.diagnose.inputs:of_pairs",
            hashes="tether.train.reward:input_hashes",
            many=True,
            headline=(
                ("loss", "reward_model/loss", "nats per pair; knowing nothing is 0.693"),
                ("accuracy", "reward_model/accuracy", "on the pairs of each step"),
            ),
            losses=("reward_model/loss",),
            alarms=(
                "not_finite", "skipped_steps", "gradient_norm", "at_chance", "weak_reward_model", "still_learning",
                "memorized", "margins_exploding", "stale", "recorded",
            ),
            curves="tether.reports.curves:REWARD",
            report="reward_report.json",
            page="tether.reports.page:reward_page",
            final="classifier",
        ),
        Kind(
            command="ppo",
            title="PPO",
            purpose="Improve a model against its rewards with PPO.",
            config=PPOConfig,
            section="ppo",
            run="tether.train.ppo:ppo",
            inputs="tether.diagnose.inputs:of_ppo",
            hashes="tether.train.ppo:input_hashes",
            memory="tether.diagnose.memory:beside_policy",
            total="ppo.cycles",
            unit="cycle",
            many=True,
            headline=(
                ("score", "reward/score_mean", ""),
                ("held-out", "eval/score_mean", "on prompts that are never trained on"),
                ("KL", "kl/ref_mean", "nats per response, to the reference"),
                ("entropy", "policy/entropy", "nats per token"),
            ),
            losses=("policy/loss", "value/loss", "kl/ref_mean"),  # what else is not finite shows in one of them
            alarms=(
                "not_finite", "skipped_steps", "first_ratio", "sampler_gap", "negative_kl", "runaway_kl",
                "entropy_collapse", "repeated_phrase", "long_steps", "clip_fraction", "length_runaway",
                "truncation_runaway", "dead_critic", "reward_saturation", "score_falling", "second_opinion",
                "stale", "recorded",
            ),
            curves="tether.reports.curves:ppo_curves",
            page="tether.reports.page:ppo_page",
            tried=True,
        ),
        Kind(
            command="dpo",
            title="DPO",
            purpose="Learn from preferences directly, without a reward model.",
            config=DPOConfig,
            section="dpo",
            run="tether.train.dpo:dpo",
            inputs="tether.diagnose.inputs:of_preferences",
            hashes="tether.train.dpo:input_hashes",
            memory="tether.diagnose.memory:named_reference",
            many=True,
            headline=(
                ("loss", "dpo/loss", "of the preferences; knowing nothing is 0.693 under sigmoid"),
                ("accuracy", "dpo/accuracy", "of the implicit reward, on each step"),
                ("chosen", "dpo/chosen_logratio", "nats per token, to the reference"),
                ("rejected", "dpo/rejected_logratio", "nats per token, to the reference"),
            ),
            losses=("dpo/loss",),
            alarms=(
                "not_finite", "skipped_steps", "loss_rising", "gradient_norm", "at_chance", "memorized",
                "chosen_falls", "stale", "recorded",
            ),
            curves="tether.reports.curves:DPO",
            report="dpo_report.json",
            page="tether.reports.page:dpo_page",
        ),
        Kind(
            command="qlearning",
            title="Q-learning",
            purpose="Improve a model from scored answers, whoever wrote them.",
            config=QLearningConfig,
            section="qlearning",
            run="tether.train.qlearning:qlearning",
            inputs="tether.diagnose.inputs:of_scored",
            hashes="tether.train.qlearning:input_hashes",
            memory="tether.diagnose.memory:named_reference",
            many=True,
            headline=(
                ("residual", "qlearning/residual", "reward units; under bellman 0 at the best policy"),
                ("critic", "value/explained_variance", "share of the returns that V foresees"),
                ("log-ratio", "qlearning/log_ratio", "nats per answer of the data, to the reference"),
            ),
            losses=("qlearning/loss",),
            alarms=("not_finite", "skipped_steps", "loss_rising", "gradient_norm", "dead_critic", "stale", "recorded"),
            curves="tether.reports.curves:QLEARNING",
            page="tether.reports.page:qlearning_page",
        ),
        Kind(
            command="evaluate",
            title="evaluation",
            purpose="Score, KL and win rate of several models on the same prompts, with intervals.",
            config=EvaluateConfig,
            section="models",
            run="tether.train.evaluate:evaluate",
            inputs="tether.diagnose.inputs:of_evaluation",
        ),
        Kind(
            command="judge",
            title="judge",
            purpose="Have a model compare pairs of answers under a constitution; its labels stand beside people's.",
            config=JudgeConfig,
            section="judge",
            run="tether.feedback.judge:judge",
            inputs="tether.feedback.judge:inputs",
            probe="tether.feedback.probe:probe",
        ),
        Kind(
            command="revise",
            title="revision",
            purpose="Have a model criticize and rewrite its answers under a constitution, as examples for tether sft.",
            config=ReviseConfig,
            section="revise",
            run="tether.feedback.revise:revise",
            inputs="tether.feedback.revise:inputs",
        ),
    )
}  # fmt: skip


def kind_of(config: Config) -> Kind:
    """The kind of run that a config is for."""
    return next(kind for kind in KINDS.values() if type(config) is kind.config)


def resolve(name: str) -> Any:
    """What `module:name` names, imported now."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
