"""What a run is made of: nested frozen dataclasses, checked before a model is loaded.

One dataclass a command: `PPOConfig`, `SFTConfig`, `RewardConfig`, `EvaluateConfig`. Their fields are the keys of the
YAML file and the dotted flags of the command line; the text under a field is its help. `check` holds the rules that
need more than one key, or a range, and raises `ConfigError`. Reading YAML and flags is in `reading`; nothing here
imports anything heavier than dataclasses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, Literal

from tether.errors import ConfigError

# ---------------------------------------------------------------- parts that several commands share


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft): train a small update, share the frozen model with the reference."""

    rank: int = 16
    """Rank r of the update BA; more learns more and costs more memory. 16 is peft's usual middle."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank. Twice the rank is the common choice."""
    targets: str | list[str] = "all-linear"
    """Module names that get an adapter, or all-linear for every linear layer but the head."""


@dataclass(frozen=True)
class InitModelConfig:
    """A model from scratch: an architecture with random weights, and the tokenizer it is for."""

    init: dict[str, Any]
    """Keys of the transformers config, model_type among them: {model_type: llama, hidden_size: 64, …}."""
    tokenizer: str
    """Directory or hub id of the tokenizer; vocabulary size and special ids are taken from it."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model learns, in which precision."""

    policy: str
    """Directory or hub id of the causal language model that learns."""
    critic: str = "shared"
    """shared: a value head on the policy's trunk (one forward pass for both). separate: a trunk of its own, copied from
    the policy. A directory: a trunk of its own from there; a reward model's head comes along."""
    reference: str | None = None
    """Directory of the frozen model that the KL is measured to; null: the policy as it is when the run begins."""
    lora: LoraConfig | None = None
    """Adapters instead of full fine-tuning; null trains every weight."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision. auto: bfloat16 where the machine is better for it, else float32. Trained weights always keep a
    float32 master."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: on for models above 1B on
    a GPU. Gradients agree either way."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); null is the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: it can do anything that you can."""


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id, with a column `prompt` (text or messages)."""
    split: str = "train"
    """Split of a hub dataset; files have only one."""
    max_tokens: int = 512
    """Longest prompt, in tokens."""
    overlong: Literal["error", "cut_left", "drop"] = "error"
    """What happens to a longer prompt: error names it, cut_left keeps its end, drop counts and prints what it drops."""
    limit: int | None = None
    """Use only the first so many rows; null uses all."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, for prompts that are messages."""


@dataclass(frozen=True)
class RewardSourceConfig:
    """One source of scores: a Python function or a reward model."""

    function: str | None = None
    """FILE.py:NAME or package.module:NAME of f(prompts, completions, completion_ids, **columns), which returns a list
    of numbers, None where it has no answer."""
    model: str | None = None
    """Directory or hub id of a sequence classifier with one label."""
    weight: float = 1.0
    """Factor of this source in the sum."""
    name: str | None = None
    """Name in metrics and rollouts (reward/<name>_mean, score/<name>); null: the function's or the directory's."""
    timeout_s: float = 60.0
    """Seconds that a function may take for a whole cycle; then the run stops, saved."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of a reward model."""


@dataclass(frozen=True)
class MissingEosConfig:
    """What a response costs that ran into the length limit without a stop token; exactly one of the two."""

    set: float | None = None
    """The score becomes this (Ziegler et al. 2019 use -1)."""
    subtract: float | None = None
    """The score loses this much."""


@dataclass(frozen=True)
class RewardShapingConfig:
    """What happens to the summed score before it is used: first clip, then missing_eos."""

    clip: float | None = None
    """Scores are clipped to [-clip, clip]; null does not clip."""
    missing_eos: MissingEosConfig | None = None
    """Rule for responses without a stop token; null: none."""


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Filters in this order: temperature, top-k, top-p."""

    engine: Literal["local"] = "local"
    """Which sampler: local is ours, in this process, sharing the policy's weights."""
    temperature: float = 1.0
    """Divides the logits in every pass, here and in training; > 0."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all. More makes sampler and policy differ, by check/truncated_mass."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this mass; 1 keeps all."""
    max_new_tokens: int = 64
    """Longest response, in tokens, stop token included; part of the task: cut responses are not bootstrapped."""
    stop_token_ids: list[int] | None = None
    """Ids that end a response. null: every eos of the generation config, else the tokenizer's; [] : none."""
    slots: int | Literal["auto"] = "auto"
    """Rows that are decoded at once; auto: as many as a cycle has, up to 256 where their cache stays small, else up to
    64. Never changes a result beyond rounding."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float | None = None
    """Peak learning rate; null: 1e-5, with LoRA 1e-4."""
    critic_lr: float | None = None
    """Learning rate of the critic; null: 10·lr for a head (it starts at zero), lr for a separate critic."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """After the warm-up: linear and cosine end at 0 with the last step."""
    warmup: int = 0
    """Optimiser steps over which lr rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1.0e-5
    """Adam's epsilon; 1e-5 as in the original PPO code."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0: the KL is the regulariser."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, policy and critic together."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, an extra: pip install tether[wandb]."""

    project: str = "tether"
    """Project name."""
    entity: str | None = None
    """Team or user; null: your default."""


@dataclass(frozen=True)
class LogConfig:
    """What is written beside metrics.jsonl."""

    rollouts_every: int = 1
    """Write a cycle's rollouts every so many cycles; 0 writes none."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases; null sends nothing anywhere."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run can be continued from."""

    every: int = 50
    """Cycles (for sft and reward: optimiser steps) between checkpoints; the last is always saved."""
    keep: int = 2
    """Checkpoints kept, at least 2: should the newest be damaged, there is one before it."""


# ---------------------------------------------------------------- tether ppo


@dataclass(frozen=True)
class KLConfig:
    """The leash to the reference."""

    coef: float = 0.05
    """β: reward units a nat. With a target, only the start."""
    target: float | None = None
    """KL to hold, in nats a response, by adapting β; null keeps β."""
    horizon: float = 10000.0
    """Responses over which β can change by 20 % (Ziegler et al. 2019)."""
    place: Literal["reward", "loss"] = "reward"
    """reward: k1 in every token's reward, the one with the right optimum. loss: k2 in the loss."""


@dataclass(frozen=True)
class PPOSection:
    """The algorithm."""

    cycles: int = 200
    """Cycles of rollout and update."""
    batch: int = 64
    """Responses a cycle."""
    responses_per_prompt: int = 1
    """Responses to each prompt; 2 or more let the optimality gap be measured."""
    epochs: int = 4
    """Passes over a cycle's responses."""
    minibatch: int = 16
    """Responses an optimiser step; divides batch."""
    microbatch_tokens: int = 8192
    """Padded tokens in memory at once; never changes the result, only memory and speed."""
    gamma: float = 1.0
    """Discount γ a token; 1: a response is short and its score is what counts."""
    lam: float = 0.95
    """λ of GAE."""
    critic_lam: float | None = None
    """λ of the returns that the critic learns (VC-PPO, arXiv:2503.01491); null: lam. 1 is Monte Carlo: no bias from a
    critic that is still wrong."""
    whiten: bool = True
    """Bring a cycle's advantages to mean 0 and variance 1."""
    clip: float = 0.2
    """ε of the ratio's clip: the ratio stays above 1 - ε, and below 1 + ε unless clip_high is set."""
    clip_high: float | None = None
    """ε of the upper side alone; null: clip. 0.28 beside a clip of 0.2 lets unlikely tokens rise faster (DAPO)."""
    value_clip: float | None = 0.2
    """Values move at most this far from the old ones before the loss stops rewarding it; null: no clip."""
    value_coef: float = 0.1
    """c1: weight of the value loss."""
    entropy_coef: float = 0.0
    """c2: weight of the entropy bonus."""
    kl: KLConfig = field(default_factory=KLConfig)
    stop_epoch_at_kl: float | None = None
    """Leave a cycle's epochs when KL(old‖new), nats a token, passes this; null: never."""
    value_warmup_cycles: int = 0
    """First cycles in which only the critic learns and a shared trunk is frozen."""

    @property
    def clips(self) -> tuple[float, float]:
        """ε below and above 1."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high

    @property
    def lams(self) -> tuple[float, float]:
        """λ of the advantages and of the returns."""
        return self.lam, self.lam if self.critic_lam is None else self.critic_lam


@dataclass(frozen=True)
class HeldOutConfig:
    """Evaluation during training."""

    every: int = 10
    """Cycles between evaluations; 0: none."""
    prompts: str | None = None
    """File of prompts; null: `count` prompts held out of `prompts`."""
    count: int = 16
    """Prompts, the same through the whole run so that one sees them learn."""
    samples: int = 4
    """Responses to each."""


@dataclass(frozen=True)
class PPOConfig:
    """Everything of a PPO run."""

    run: str
    """The run directory."""
    model: ModelConfig
    prompts: PromptsConfig
    reward: list[RewardSourceConfig] = field(default_factory=list)
    """Sources of the score, summed by weight; may be empty only when tether.ppo gets reward=fn."""
    seed: int = 0
    """Seed of every draw in the run."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, for bit-equal resume there; the CPU is so anyway."""
    reward_shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOSection = field(default_factory=PPOSection)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: HeldOutConfig = field(default_factory=HeldOutConfig)


# ---------------------------------------------------------------- tether sft, tether reward


@dataclass(frozen=True)
class DataConfig:
    """Where training examples come from."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id."""
    split: str = "train"
    """Split of a hub dataset; files have only one."""
    max_tokens: int = 512
    """Longest example, prompt and completion together, in tokens."""
    overlong: Literal["error", "cut_left", "drop"] = "error"
    """What happens to a longer example: error names it, cut_left cuts the prompt's start, drop counts what it drops."""
    limit: int | None = None
    """Use only the first so many rows; null uses all."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, for examples that are messages."""


@dataclass(frozen=True)
class LabelsConfig:
    """Which labels count, where data.path is a store of labels (preferences.db); null: every one that stands."""

    annotators: list[str] | None = None
    """Only labels by these people; null: everybody's."""
    since: str | None = None
    """Only labels from this date (2026-10-01) or time on, UTC; null: from the first."""
    until: str | None = None
    """Only labels up to this date, its whole day, or time, UTC; null: up to when the run begins. Resumed, a run reads
    the labels that it began with, whatever was labelled since."""
    guideline: int | None = None
    """Only labels given under this version of the guidelines; null: any."""


@dataclass(frozen=True)
class PairsConfig(DataConfig):
    """Where preferences come from: a file of pairs, or a store of labels (preferences.db)."""

    labels: LabelsConfig = field(default_factory=LabelsConfig)


@dataclass(frozen=True)
class SFTModelConfig:
    """Which model learns to imitate."""

    policy: str | InitModelConfig
    """Directory or hub id; or {init: {architecture…}, tokenizer: DIR} for a model from scratch."""
    lora: LoraConfig | None = None
    """Adapters instead of full fine-tuning; the final directory is merged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; trained weights keep a float32 master."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True)
class SFTSection:
    """Supervised fine-tuning."""

    epochs: int = 1
    """Passes over the data."""
    batch: int = 32
    """Examples (or, packed, rows of max_tokens) an optimiser step."""
    microbatch_tokens: int = 8192
    """Padded tokens in memory at once; never changes the result."""
    packing: bool = False
    """Several examples in one row of max_tokens; attention never crosses from one to the next."""
    train_on: Literal["completion", "all"] = "completion"
    """completion: loss on the answer and its stop token alone. all: on the prompt too."""


@dataclass(frozen=True)
class SFTConfig:
    """Everything of a supervised fine-tuning run."""

    run: str
    """The run directory."""
    model: SFTModelConfig
    data: DataConfig
    seed: int = 0
    """Seed of every draw in the run."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    deterministic: bool = False
    """Deterministic kernels on a GPU."""
    sft: SFTSection = field(default_factory=SFTSection)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class RewardModelSection:
    """Fitting a Bradley–Terry reward model to pairs."""

    epochs: int = 1
    """Passes over the pairs; more than one or two overfits human labels."""
    batch: int = 32
    """Pairs an optimiser step."""
    microbatch_tokens: int = 8192
    """Padded tokens in memory at once; never changes the result."""
    center: float = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores near 0."""
    test_fraction: float = 0.1
    """Share of the pairs held out for the reported accuracy; pairs with a prompt or group in common stay together."""


@dataclass(frozen=True)
class RewardConfig:
    """Everything of a reward-model run."""

    run: str
    """The run directory."""
    model: SFTModelConfig
    data: PairsConfig
    seed: int = 0
    """Seed of every draw in the run."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    deterministic: bool = False
    """Deterministic kernels on a GPU."""
    reward_model: RewardModelSection = field(default_factory=RewardModelSection)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.data, PairsConfig) and isinstance(self.data, DataConfig):
            # A DataConfig is a PairsConfig without filters; as one it is written to YAML, and loads back equal.
            given = {f.name: getattr(self.data, f.name) for f in fields(self.data)}
            object.__setattr__(self, "data", PairsConfig(**given))


# ---------------------------------------------------------------- tether evaluate


@dataclass(frozen=True)
class EvaluateConfig:
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
    samples: int = 8
    """Responses to each prompt."""
    seed: int = 0
    """Seed of the samples and of the bootstrap."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models."""
    reward_shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


Config = PPOConfig | SFTConfig | RewardConfig | EvaluateConfig


# ---------------------------------------------------------------- rules

DEVICES = ("auto", "cpu", "cuda", "mps")


def check(config: Config, *, reward_given: bool = False) -> None:
    """Raise ConfigError for a value out of range or for keys that contradict each other.

    reward_given: a reward function was passed from Python, so the list in the config may be empty.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"config is {type(config).__name__} {str(config)[:60]!r}, where the dataclasses of a config belong. Load "
            "it first: tether.load_config(PATH)."
        )
    for key, value in _leaves(config):
        if isinstance(value, str) and any(len(part.encode(errors="replace")) > 255 for part in value.split("/")):
            raise ConfigError(
                f"{key} has {len(value):,} characters ({value[:40]!r}…): no file or directory has a name as long. Is "
                "it the text itself? Write that to a file, and name the file."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not a finite number: nothing computed with it would be. Set a number.")
        if value == "":
            raise ConfigError(f"{key} is empty: it would name nothing. Give it a value, or leave it out.")
    if config.device.partition(":")[0] not in DEVICES:
        raise ConfigError(
            f"device={config.device!r} is not a device that anything can be computed on here. Set one of "
            f"{', '.join(DEVICES)}, or cuda:N."
        )
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed} is outside [0, 2^63): generators take no other. Set e.g. 0.")
    match config:
        case PPOConfig():
            _check_ppo(config, reward_given)
        case SFTConfig():
            _check_sft(config)
        case RewardConfig():
            _check_reward(config)
        case EvaluateConfig():
            _check_evaluate(config, reward_given)


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """Raise ConfigError where a run of so many optimiser steps ends within its warm-up."""
    if optim.warmup >= steps:
        raise ConfigError(
            f"optim.warmup={optim.warmup} is not below the run's {steps} optimiser steps: the learning rate "
            "would never arrive. Set a shorter warm-up."
        )


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(node):
        for f in fields(node):
            yield from _leaves(getattr(node, f.name), f"{path}.{f.name}" if path else f.name)
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, node


def _at_least(key: str, value: float, low: float, why: str) -> None:
    if value < low:
        raise ConfigError(f"{key}={value} is below {low:g}: {why}. Set {key} to {low:g} or more.")


def _above_zero(key: str, value: float, why: str) -> None:
    if value <= 0:
        raise ConfigError(f"{key}={value} is not above 0: {why}. Set {key} to a positive number.")


def _unit(key: str, value: float, why: str) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}={value} is outside [0, 1]: {why}. Set {key} between 0 and 1.")


def _check_ppo(config: PPOConfig, reward_given: bool) -> None:
    p = config.ppo
    _at_least("ppo.cycles", p.cycles, 1, "nothing would be trained")
    _at_least("ppo.batch", p.batch, 1, "a cycle would have no responses")
    _at_least("ppo.responses_per_prompt", p.responses_per_prompt, 1, "no prompt would be answered")
    _at_least("ppo.epochs", p.epochs, 1, "nothing would be learned from a cycle")
    _at_least("ppo.minibatch", p.minibatch, 1, "an optimiser step would have no responses")
    _at_least("ppo.microbatch_tokens", p.microbatch_tokens, 1, "not one token would fit in memory")
    if p.batch % p.minibatch:
        raise ConfigError(
            f"ppo.minibatch={p.minibatch} does not divide ppo.batch={p.batch}: the last {p.batch % p.minibatch} "
            f"responses of every cycle would never be trained on. Set ppo.minibatch to a divisor of {p.batch}."
        )
    if p.batch % p.responses_per_prompt:
        raise ConfigError(
            f"ppo.responses_per_prompt={p.responses_per_prompt} does not divide ppo.batch={p.batch}: one prompt would "
            f"get fewer responses than the others. Set it to a divisor of {p.batch}."
        )
    _unit("ppo.gamma", p.gamma, "future rewards would grow with distance")
    for key, lam in (("ppo.lam", p.lam), ("ppo.critic_lam", p.critic_lam)):
        if lam is not None:
            _unit(key, lam, "GAE weights the k-step advantages by λ^k, which would grow without bound")
    for key, eps in (("ppo.clip", p.clip), ("ppo.clip_high", p.clip_high)):
        if eps is not None:
            _above_zero(key, eps, "every ratio would be clipped and nothing learned")
    if p.clip >= 1:
        raise ConfigError(
            f"ppo.clip={p.clip}: the lower ratio bound 1 - {p.clip} is not above 0, so it would never bind. Set "
            "ppo.clip below 1; ppo.clip_high may be larger."
        )
    if p.value_clip is not None:
        _above_zero("ppo.value_clip", p.value_clip, "values could never move; null turns the clip off")
    _at_least("ppo.value_coef", p.value_coef, 0, "the critic would be driven away from the returns")
    _at_least("ppo.entropy_coef", p.entropy_coef, 0, "entropy would be minimised")
    _at_least("ppo.kl.coef", p.kl.coef, 0, "the policy would be paid for leaving the reference")
    if p.kl.target is not None:
        _above_zero("ppo.kl.target", p.kl.target, "a KL of 0 is the untrained model")
        _above_zero("ppo.kl.coef", p.kl.coef, "an adaptive β moves by factors and would stay 0")
    _above_zero("ppo.kl.horizon", p.kl.horizon, "β would jump by any amount")
    if p.kl.target is not None and p.batch >= 5 * p.kl.horizon:
        raise ConfigError(
            f"ppo.kl.horizon={p.kl.horizon:g} is too short for ppo.batch={p.batch}: β changes by up to 20 % a horizon, "
            f"so one cycle could make it zero or negative. Set ppo.kl.horizon above {p.batch / 5:g}, better above "
            f"{p.batch}."
        )
    if p.stop_epoch_at_kl is not None:
        _above_zero("ppo.stop_epoch_at_kl", p.stop_epoch_at_kl, "every cycle would stop at once; null turns it off")
    _at_least("ppo.value_warmup_cycles", p.value_warmup_cycles, 0, "a count of cycles cannot be negative")
    if p.value_warmup_cycles >= p.cycles:
        raise ConfigError(
            f"ppo.value_warmup_cycles={p.value_warmup_cycles} is not below ppo.cycles={p.cycles}: the policy would "
            "never learn. Set fewer warm-up cycles or more cycles."
        )
    check_warmup(config.optim, p.cycles * p.epochs * (p.batch // p.minibatch))
    e = config.evaluate
    _at_least("evaluate.every", e.every, 0, "0 already means never")
    _at_least("evaluate.count", e.count, 1, "there would be nothing to evaluate; evaluate.every 0 turns it off")
    _at_least("evaluate.samples", e.samples, 1, "there would be nothing to evaluate; evaluate.every 0 turns it off")
    _check_prompts(config.prompts)
    _check_sampling(config.sampling)
    _check_lora(config.model.lora)
    _check_sources(config.reward, config.reward_shaping, reward_given)
    _check_training(config.optim, config.log, config.checkpoint)


def _check_sft(config: SFTConfig) -> None:
    _at_least("sft.epochs", config.sft.epochs, 1, "nothing would be trained")
    _at_least("sft.batch", config.sft.batch, 1, "an optimiser step would have no examples")
    _at_least("sft.microbatch_tokens", config.sft.microbatch_tokens, 1, "not one token would fit in memory")
    _check_data(config.data)
    _check_model(config.model)
    _check_training(config.optim, config.log, config.checkpoint)


def _check_reward(config: RewardConfig) -> None:
    section = config.reward_model
    _at_least("reward_model.epochs", section.epochs, 1, "nothing would be trained")
    _at_least("reward_model.batch", section.batch, 1, "an optimiser step would have no pairs")
    _at_least("reward_model.microbatch_tokens", section.microbatch_tokens, 1, "not one token would fit in memory")
    _at_least("reward_model.center", section.center, 0, "scores would be driven apart without bound")
    if not 0 < section.test_fraction < 1:
        raise ConfigError(
            f"reward_model.test_fraction={section.test_fraction} is not between 0 and 1: without held-out pairs no "
            "accuracy can be reported, without training pairs nothing learned. Set e.g. 0.1."
        )
    _check_data(config.data)
    _check_labels(config.data.labels)
    _check_model(config.model)
    _check_training(config.optim, config.log, config.checkpoint)


def _check_evaluate(config: EvaluateConfig, reward_given: bool) -> None:
    if isinstance(config.models, str):  # from Python; YAML is typed
        raise ConfigError(f"models is the text {config.models[:60]!r}: every letter would be a model. Give a list.")
    if not config.models:
        raise ConfigError("models is empty: there is nothing to evaluate. List at least one model directory.")
    _at_least("samples", config.samples, 1, "there would be nothing to score")
    _check_prompts(config.prompts)
    _check_sampling(config.sampling)
    _check_sources(config.reward, config.reward_shaping, reward_given)


def _check_prompts(prompts: PromptsConfig) -> None:
    _at_least("prompts.max_tokens", prompts.max_tokens, 1, "no prompt would fit")
    if prompts.limit is not None:
        _at_least("prompts.limit", prompts.limit, 1, "no prompt would be left; null uses all")


def _check_data(data: DataConfig) -> None:
    _at_least("data.max_tokens", data.max_tokens, 2, "no example would fit")
    if data.limit is not None:
        _at_least("data.limit", data.limit, 1, "no example would be left; null uses all")


def _check_labels(labels: LabelsConfig) -> None:
    if labels.annotators is not None and not labels.annotators:
        raise ConfigError("data.labels.annotators is empty: no label would be left. Leave it out for everybody.")
    for key, text in (("since", labels.since), ("until", labels.until)):
        try:
            datetime.fromisoformat(text or "2000-01-01")
        except ValueError:
            raise ConfigError(
                f"data.labels.{key}={text!r} is no date or time: it is unclear which labels are meant. Write "
                "2026-10-01, or 2026-10-01T09:30."
            ) from None
    if labels.guideline is not None:
        _at_least("data.labels.guideline", labels.guideline, 1, "versions count from 1; null takes every label")


def _check_sampling(s: SamplingConfig) -> None:
    _above_zero(
        "sampling.temperature",
        s.temperature,
        "logits are divided by it, and greedy samples have no probability to take a ratio of",
    )
    _at_least("sampling.top_k", s.top_k, 0, "0 already keeps every token")
    if not 0 < s.top_p <= 1:
        raise ConfigError(
            f"sampling.top_p={s.top_p} is outside (0, 1]: it is the mass of the tokens kept. Set 1 to keep all."
        )
    _at_least("sampling.max_new_tokens", s.max_new_tokens, 1, "responses would be empty")
    if s.slots != "auto":
        _at_least("sampling.slots", s.slots, 1, "no row could be decoded; auto chooses")
    for token in s.stop_token_ids or []:
        _at_least("sampling.stop_token_ids", token, 0, "token ids count from 0")


def _check_model(model: SFTModelConfig) -> None:
    if isinstance(model.policy, InitModelConfig) and "model_type" not in model.policy.init:
        raise ConfigError(
            "model.policy.init has no model_type: it would be unclear which architecture to build. Add e.g. "
            "model_type: llama."
        )
    _check_lora(model.lora)


def _check_lora(lora: LoraConfig | None) -> None:
    if lora is not None:
        _at_least("model.lora.rank", lora.rank, 1, "the adapter would be empty; lora: null trains every weight")
        _above_zero("model.lora.alpha", lora.alpha, "the adapter would have no effect")


RESERVED_NAMES = ("score", "total")  # reward/score_mean and reward/total_mean are metrics of the sum


def _check_sources(sources: list[RewardSourceConfig], shaping: RewardShapingConfig, reward_given: bool) -> None:
    if not sources and not reward_given:
        raise ConfigError(
            "reward is empty: nothing would score the responses. Add {function: FILE.py:NAME} or {model: DIR}, "
            "or pass reward=fn from Python."
        )
    names: set[str] = set()
    for i, source in enumerate(sources):
        if (source.function is None) == (source.model is None):
            raise ConfigError(
                f"reward[{i}] needs exactly one of function and model, got function={source.function!r} and "
                f"model={source.model!r}: it would be unclear what scores. Make it two entries, or drop one."
            )
        if source.function is not None and not all(source.function.rpartition(":")[::2]):
            raise ConfigError(
                f"reward[{i}].function={source.function!r} does not name a function: write FILE.py:NAME or "
                "package.module:NAME."
            )
        _above_zero(f"reward[{i}].timeout_s", source.timeout_s, "every call would time out")
        name = source_name(source)
        if name in names:
            raise ConfigError(
                f"reward[{i}] is called {name!r} like one before it: their metrics would overwrite each other. "
                f"Set reward[{i}].name."
            )
        if name in RESERVED_NAMES:
            raise ConfigError(
                f"reward[{i}] is called {name!r}, as the metric reward/{name}_mean already is: it would be "
                f"overwritten. Set reward[{i}].name."
            )
        names.add(name)
    if shaping.clip is not None:
        _above_zero("reward_shaping.clip", shaping.clip, "every score would be 0; null turns it off")
    rule = shaping.missing_eos
    if rule is not None and (rule.set is None) == (rule.subtract is None):
        raise ConfigError("reward_shaping.missing_eos needs exactly one of set and subtract. Write {set: -1.0}, say.")


def source_name(source: RewardSourceConfig) -> str:
    """The name a source has in metrics and rollouts: its `name`, else the function's name or the directory's."""
    if source.name:
        return source.name
    if source.function:
        return source.function.rpartition(":")[2]
    return str(source.model).rstrip("/").rpartition("/")[2]


def _check_training(optim: OptimConfig, log: LogConfig, checkpoint: CheckpointConfig) -> None:
    for key, lr in (("optim.lr", optim.lr), ("optim.critic_lr", optim.critic_lr)):
        if lr is not None:
            _above_zero(key, lr, "nothing would be learned")
    _at_least("optim.warmup", optim.warmup, 0, "a count of steps cannot be negative")
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas={optim.betas}: {beta} is outside [0, 1): the average would not decay.")
    _above_zero("optim.eps", optim.eps, "Adam would divide by zero")
    _at_least("optim.weight_decay", optim.weight_decay, 0, "weights would grow")
    _above_zero("optim.max_grad_norm", optim.max_grad_norm, "every step would be zero")
    _at_least("log.rollouts_every", log.rollouts_every, 0, "0 already means never")
    _at_least("checkpoint.every", checkpoint.every, 1, "the run could not be resumed")
    _at_least("checkpoint.keep", checkpoint.keep, 2, "a damaged checkpoint would have none before it")
