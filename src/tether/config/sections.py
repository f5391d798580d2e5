"""The sections of a config that several commands share, and the `check` that comes before a model is loaded.

Nested frozen dataclasses: their fields are the keys of the YAML file and the dotted flags of the command line, the text
under a field is its help, and its bound stands on it. A section's `check` holds the rules across its keys. Nothing here
imports anything heavier than dataclasses; reading YAML and flags is in `reading`.
"""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from tether.config.keys import Section, at_least, leaves, positive, within
from tether.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
RESERVED_NAMES = ("score", "total")  # reward/score_mean and reward/total_mean are metrics of the sum

Dtype = Literal["auto", "float32", "bfloat16"]
Seed = Annotated[int, within(0, 2**63, "generators take no other", "Set e.g. 0.", ends="[)")]
MicrobatchTokens = Annotated[int, at_least(1, "not one token would fit in memory")]


class Config(Section):
    """What a command takes: everything of a run."""

    seed: int
    device: str

    def check(self, key: str) -> None:
        if self.device.partition(":")[0] not in DEVICES:
            raise ConfigError(
                f"device={self.device!r} is not a device that anything can be computed on here. Set one of "
                f"{', '.join(DEVICES)}, or cuda:N."
            )


def check(config: Config, *, reward_given: bool = False) -> None:
    """Raise ConfigError for a value out of range or for keys that contradict each other.

    reward_given: a reward function was passed from Python, so the list in the config may be empty.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"config is {type(config).__name__} {str(config)[:60]!r}, where the dataclasses of a config belong. Load "
            "it first: tether.load_config(PATH)."
        )
    for key, value, bound in leaves(config):
        if isinstance(value, str) and longest_name(value) > 255:
            raise ConfigError(
                f"{key} has {len(value.encode(errors='replace')):,} bytes ({value[:40]!r}…): no file or directory has "
                "a name as long. Is it the text itself? Write that to a file, and name the file."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise not_finite(key, value)
        if value == "":
            raise ConfigError(f"{key} is empty: it would name nothing. Give it a value, or leave it out.")
        if bound and isinstance(value, int | float) and not isinstance(value, bool):
            complaint = bound.complaint(re.sub(r"\[\d+\]$", "", key), value)
            if complaint:
                raise ConfigError(complaint)
    for key, value, _ in leaves(config):
        if isinstance(value, Section):
            value.check(key)
    if not reward_given and getattr(config, "reward", None) == []:
        raise ConfigError(
            "reward is empty: nothing would score the responses. Add {function: FILE.py:NAME} or {model: DIR}, "
            "or pass reward=fn from Python."
        )


def longest_name(path: str) -> int:
    """Bytes of the longest name between slashes: file systems take 255."""
    return max(len(part.encode(errors="replace")) for part in path.split("/"))


def not_finite(key: str, value: float) -> ConfigError:
    """For a number that is none."""
    return ConfigError(f"{key}={value} is not a finite number: nothing computed with it would be. Set a number.")


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (peft): train a small update, share the frozen model with the reference."""

    rank: Annotated[int, at_least(1, "the adapter would be empty; lora: null trains every weight")] = 16
    """Rank r of the update BA; more learns more and costs more memory. 16 is peft's usual middle."""
    alpha: Annotated[float, positive("the adapter would have no effect")] = 32.0
    """Scale: the update is multiplied by alpha / rank. Twice the rank is the common choice."""
    targets: str | list[str] = "all-linear"
    """Module names that get an adapter, or all-linear for every linear layer but the head."""


@dataclass(frozen=True)
class InitModelConfig(Section):
    """A model from scratch: an architecture with random weights, and the tokenizer it is for."""

    init: dict[str, Any]
    """Keys of the transformers config, model_type among them: {model_type: llama, hidden_size: 64, …}."""
    tokenizer: str
    """Directory or hub id of the tokenizer; vocabulary size and special ids are taken from it."""

    def check(self, key: str) -> None:
        if "model_type" not in self.init:
            raise ConfigError(
                f"{key}.init has no model_type: it would be unclear which architecture to build. Add e.g. "
                "model_type: llama."
            )


@dataclass(frozen=True)
class SFTModelConfig(Section):
    """Which model learns, in which precision."""

    policy: str | InitModelConfig
    """Directory or hub id; or {init: {architecture…}, tokenizer: DIR} for a model from scratch."""
    lora: LoraConfig | None = None
    """Adapters instead of full fine-tuning, merged into the final directory; null trains every weight."""
    dtype: Dtype = "auto"
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
class ReferencedModelConfig(SFTModelConfig):
    """Which model learns, in which precision, and what it is compared with."""

    policy: str
    """Directory or hub id of the causal language model that learns."""
    reference: str | None = None
    """Directory of the frozen model that the KL is measured to; null: the policy as it is when the run begins."""


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig(Section):
    """Where training examples come from."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id."""
    split: str = "train"
    """Split of a hub dataset; files have only one."""
    max_tokens: Annotated[int, at_least(2, "no example would fit")] = 512
    """Longest example, prompt and completion together, in tokens."""
    overlong: Literal["error", "cut_left", "drop"] = "error"
    """What happens to a longer one: error names it, cut_left cuts the prompt's start, drop counts and prints what it
    drops."""
    limit: Annotated[int | None, at_least(1, "nothing would be left; null uses all")] = None
    """Use only the first so many rows; null uses all."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, for rows that are messages."""


@dataclass(frozen=True)
class PromptsConfig(DataConfig):
    """Where prompts come from."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id, with a column `prompt` (text or messages)."""
    max_tokens: Annotated[int, at_least(1, "no prompt would fit")] = 512
    """Longest prompt, in tokens."""


@dataclass(frozen=True)
class LabelsConfig(Section):
    """Which labels count, where data.path is a store of labels (preferences.db); null: every one that stands."""

    annotators: list[str] | None = None
    """Only labels by these people; null: everybody's."""
    since: str | None = None
    """Only labels from this date (2026-10-01) or time on, UTC; null: from the first."""
    until: str | None = None
    """Only labels up to this date, its whole day, or time, UTC; null: up to when the run begins. Resumed, a run reads
    the labels that it began with, whatever was labeled since."""
    guideline: Annotated[int | None, at_least(1, "versions count from 1; null takes every label")] = None
    """Of people's labels only those given under this version of the guidelines; null: any."""
    judges: bool = False
    """Labels of judges (tether judge) too, beside those of the people above. Off: only those of a judge that
    `annotators` names."""

    def check(self, key: str) -> None:
        if self.annotators == []:
            raise ConfigError(f"{key}.annotators is empty: no label would be left. Leave it out for everybody.")
        for name, text in (("since", self.since), ("until", self.until)):
            try:
                datetime.fromisoformat(text or "2000-01-01")
            except ValueError:
                raise ConfigError(
                    f"{key}.{name}={text!r} is no date or time: it is unclear which labels are meant. Write "
                    "2026-10-01, or 2026-10-01T09:30."
                ) from None


# ---------------------------------------------------------------- rewards and sampling


_SCORERS = ("function", "model", "models", "url", "judge")  # keys of a source that say what scores


@dataclass(frozen=True)
class RewardSourceConfig(Section):
    """One source of scores: a Python function, a reward model, an ensemble of them, a server of one, or a judge."""

    function: str | None = None
    """FILE.py:NAME or package.module:NAME of f(prompts, completions, completion_ids, **columns), which returns a list
    of numbers, None where it has no answer."""
    model: str | None = None
    """Directory or hub id of a sequence classifier with one label."""
    models: list[str] | None = None
    """Two or more of them with one tokenizer, an ensemble: `tether reward` with reward_model.members trains one."""
    pessimism: Annotated[float, at_least(0, "the score would be above the members' mean where they disagree")] = 0.5
    """Of an ensemble: how much of the members' variance the score loses, per reward unit. 0: their mean; towards
    infinity: their minimum."""
    url: str | None = None
    """Address of a server that scores, such as http://127.0.0.1:8766/score of `tether serve`; see docs/serving.md."""
    judge: str | None = None
    """YAML file of a judge, as `tether judge` takes it (`data` and `to` are not read): a model that rates the answers
    under a constitution; see docs/judge.md."""
    form: Literal["pointwise", "pairwise"] | None = None
    """How a judge scores. pointwise: each answer alone, the rating from 1 to 10 that it expects. pairwise: each against
    all others to its prompt, in log-odds; n answers to a prompt are n(n - 1)/2 pairs. null: pointwise."""
    weight: float = 1.0
    """Factor of this source in the sum."""
    name: str | None = None
    """Name in metrics and rollouts (reward/<name>_mean, score/<name>); null: the function's or the directory's, `url`
    of a url, that of a judge's file without its ending."""
    timeout_s: Annotated[float, positive("every call would time out")] = 60.0
    """Seconds that a function may take for a whole cycle, or a url with everything that is tried again, each attempt at
    most a third of them; then the run stops, saved."""
    dtype: Dtype = "auto"
    """Precision of a reward model."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a function, by name, the same for every call."""
    optional: bool = False
    """May answer None beside other sources' scores: it then adds nothing to the sum, counted as reward/<name>_missing.
    Off: a None beside another source's score ends the run."""
    key_env: str | None = None
    """Environment variable that holds a url's key; null: it wants none. The key itself is written nowhere."""
    probe: bool = True
    """Ask a url before the run whether it tells different answers apart, and refuse it where it scores them all alike;
    off for one that may, such as a verifier of exact answers."""

    def check(self, key: str) -> None:
        given = [name for name in _SCORERS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{key} needs exactly one of {', '.join(_SCORERS)}, and has {' and '.join(given) or 'none'}: it would "
                f"be unclear what scores. {'Make it two entries, or drop one.' if given else 'Add one.'}"
            )
        if self.models is not None:
            if len(self.models) < 2:
                raise ConfigError(
                    f"{key}.models has {len(self.models)} of the 2 or more that an ensemble needs: nothing could "
                    "disagree. List more directories, or write `model: DIR` for one."
                )
            places = [Path(path).resolve() for path in self.models]
            if twice := [path for path, at in zip(self.models, places, strict=True) if places.count(at) > 1]:
                raise ConfigError(
                    f"{key}.models holds {twice[-1]} twice: it would count double, and never disagree with itself. "
                    "Leave it out once."
                )
        elif self.pessimism != type(self).pessimism:
            raise ConfigError(
                f"{key}.pessimism={self.pessimism:g} without models: only an ensemble disagrees, so it would be "
                "ignored. Leave it out, or list the ensemble's directories in models."
            )
        if self.arguments and self.function is None:
            raise ConfigError(
                f"{key}.arguments is given with a {given[0]}, which takes none: it would do nothing. Leave it out."
            )
        for name, value in (("key_env", self.key_env), ("probe", None if self.probe else False)):
            if value is not None and self.url is None:
                raise ConfigError(f"{key}.{name} is for a url, and would do nothing with a {given[0]}. Leave it out.")
        if self.form is not None and self.judge is None:
            raise ConfigError(
                f"{key}.form={self.form} is for a judge, and would do nothing with a {given[0]}. Leave it out."
            )
        for name in ("timeout_s", "dtype"):
            if self.judge is not None and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(
                    f"{key}.{name} is set, and a judge goes by its own file: it would be ignored. Leave it out, and "
                    f"set {'limits.timeout_s' if name == 'timeout_s' else name} in {self.judge}."
                )
        if self.judge is not None and re.search(r"[^\w.-]", source_name(self)):
            raise ConfigError(
                f"{key} is called {source_name(self)[:80]!r}, and a judge's answers are kept in a file of that name. "
                f"Set {key}.name, of letters, digits, dots, dashes and underscores."
            )
        if self.url is not None:
            _check_url(f"{key}.url", self.url)
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", self.key_env):
            raise ConfigError(
                f"{key}.key_env is not the name of an environment variable: if it is the key itself, it would be "
                "written into every run directory. Put the key in a variable, and write that variable's name here."
            )
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ConfigError(
                f"{key}.function={self.function!r} does not name a function: write FILE.py:NAME or package.module:NAME."
            )


def model_paths(source: RewardSourceConfig) -> list[str]:
    """The reward models of a source, by directory or hub id; none where it is a function, a server or a judge."""
    return [source.model] if source.model is not None else source.models or []


def _check_url(key: str, url: str) -> None:
    """Raise ConfigError where `url` is no address of a server, or holds a secret."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{key} holds a name or password before @: it would be written into every run directory. Leave it out; a "
            "key belongs in an environment variable, which key_env names."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise ConfigError(
            f"{key}={url!r} is not the address of a server: nothing could be asked. Write http://HOST:PORT/score, or "
            "https://…"
        )


def source_name(source: RewardSourceConfig) -> str:
    """The name a source has in metrics and rollouts: its `name`, else the function's name or the directory's; of an
    ensemble "ensemble".

    That of a url is always the same: a server may move to another address while a run goes on.
    """
    if source.name:
        return source.name
    if source.models:
        return "ensemble"
    if source.function:
        return source.function.rpartition(":")[2]
    if source.url:
        return "url"
    if source.judge:
        return Path(source.judge).stem
    return str(source.model).rstrip("/").rpartition("/")[2]


def identities(source: RewardSourceConfig) -> set[str]:
    """What a source scores by, however it is written: its function with its arguments, its server, its judge, or its
    reward models."""
    if source.url is not None:
        return {source.url}
    if source.judge is not None:
        return {str(Path(source.judge).resolve())}
    if source.function is None:
        return {str(Path(path).resolve()) for path in model_paths(source)}
    file, _, name = source.function.rpartition(":")
    return {f"{Path(file).resolve() if file.endswith('.py') else file}:{name} {sorted(source.arguments.items())}"}


def check_names(sources: list[RewardSourceConfig], key: str = "reward") -> None:
    """Raise ConfigError where two sources, or a source and the sum, would have the same metrics. key: of the list."""
    names: set[str] = set()
    for i, name in enumerate(map(source_name, sources)):
        if name in names:
            raise ConfigError(
                f"{key}[{i}] is called {name!r} like one before it: their metrics would overwrite each other. "
                f"Set {key}[{i}].name."
            )
        if name in RESERVED_NAMES:
            raise ConfigError(
                f"{key}[{i}] is called {name!r}, as the metric reward/{name}_mean already is: it would be "
                f"overwritten. Set {key}[{i}].name."
            )
        names.add(name)


def check_groups(sources: list[RewardSourceConfig], counts: dict[str, int], key: str = "reward") -> None:
    """Raise ConfigError where a judge is to compare answers of which there are too few. counts: answers to a prompt, by
    the key that says so. key: of the list."""
    for i, source in enumerate(sources):
        for name, count in counts.items():
            if source.form == "pairwise" and count < 2:
                raise ConfigError(
                    f"{key}[{i}].form=pairwise with {name}={count}: an answer would have no other to be compared with. "
                    f"Set {name} to 2 or more, 4 are usual, or form to pointwise."
                )


def check_not_pairwise(sources: list[RewardSourceConfig], key: str) -> None:
    """Raise ConfigError for a judge that compares answers with each other where models are to be told apart."""
    for i, source in enumerate(sources):
        if source.form == "pairwise":
            raise ConfigError(
                f"{key}[{i}].form=pairwise: a model's answers would be compared with each other, and its mean score be "
                "0 however good they are. Set form to pointwise."
            )


@dataclass(frozen=True)
class MissingEosConfig(Section):
    """What a response costs that ran into the length limit without a stop token; exactly one of the two."""

    set: float | None = None
    """The score becomes this (Ziegler et al. 2019 use -1)."""
    subtract: float | None = None
    """The score loses this much."""

    def check(self, key: str) -> None:
        if (self.set is None) == (self.subtract is None):
            raise ConfigError(f"{key} needs exactly one of set and subtract. Write {{set: -1.0}}, say.")


@dataclass(frozen=True)
class RewardShapingConfig(Section):
    """What happens to the summed score before it is used: first clip, then missing_eos."""

    clip: Annotated[float | None, positive("every score would be 0; null turns it off")] = None
    """Scores are clipped to [-clip, clip]; null does not clip."""
    missing_eos: MissingEosConfig | None = None
    """Rule for responses without a stop token; null: none."""


# Of vLLM's own arguments, those that a run stands or falls with.
_SET_BY_US = (
    "model", "tokenizer", "dtype", "seed", "logprobs_mode", "skip_tokenizer_init", "generation_config", "hf_overrides",
    "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class VLLMConfig(Section):
    """vLLM, a process of its own beside the run, in an environment of its own; see docs/scaling.md."""

    python: str | None = None
    """The Python that has vLLM, such as vllm-env/bin/python; null: the one that runs tether."""
    dtype: Dtype = "auto"
    """Precision in vLLM. auto: the compute precision of the policy; another shows in check/sampler_gap."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM: {gpu_memory_utilization: 0.4, tensor_parallel_size: 2, …}."""

    def check(self, key: str) -> None:
        if ours := [name for name in _SET_BY_US if name in self.arguments]:
            raise ConfigError(
                f"{key}.arguments holds {ours[0]}, which the run sets itself: with another it would learn from samples "
                f"that are not its policy's. Leave it out{f', and set {key}.dtype' if ours[0] == 'dtype' else ''}."
            )


@dataclass(frozen=True)
class PoolConfig(Section):
    """Workers that sample, as Ray actors, here or on a cluster; see docs/scaling.md."""

    workers: Annotated[int, at_least(1, "nobody would sample")] = 2
    """How many, each with a copy of the policy."""
    cpus: Annotated[int, at_least(1, "it could not compute")] = 1
    """Cores of each worker, and its threads."""
    gpus: Annotated[float, within(0, 1, "a worker computes on one device", "Set 0 to sample on the CPU.")] = 0
    """GPU of each worker, or the part of one that it shares with others; 0: it samples on the CPU."""
    address: str | None = None
    """Of a Ray cluster, such as auto or HOST:6379; null: the one that RAY_ADDRESS names, else one that the run starts
    on this machine, and ends."""
    timeout_s: Annotated[float, positive("no cluster is that quick")] = 120.0
    """How long to wait for room on a cluster."""

    def check(self, key: str) -> None:
        if self.address is not None and not re.fullmatch(r"auto|[^/]+:\d+", self.address):
            raise ConfigError(
                f"{key}.address={self.address} is no address of a Ray cluster, so none could be joined. Write auto for "
                "the one on this machine, or HOST:PORT, such as 10.0.0.1:6379."
            )


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How responses are drawn. Filters in this order: temperature, top-k, top-p."""

    engine: Literal["local", "vllm", "pool"] = "local"
    """Which sampler: local is ours, in this process, sharing the policy's weights. Of `tether ppo` alone: vllm, a
    process beside it, and pool, local engines in processes that Ray places."""
    temperature: Annotated[
        float, positive("logits are divided by it, and greedy samples have no probability to take a ratio of")
    ] = 1.0
    """Divides the logits in every pass, here and in training; > 0."""
    top_k: Annotated[int, at_least(0, "0 already keeps every token")] = 0
    """Keep the k likeliest tokens; 0 keeps all. More makes sampler and policy differ, by check/truncated_mass."""
    top_p: Annotated[float, within(0, 1, "it is the mass of the tokens kept", "Set 1 to keep all.", ends="(]")] = 1.0
    """Keep the smallest set of likeliest tokens with at least this mass; 1 keeps all."""
    max_new_tokens: Annotated[int, at_least(1, "responses would be empty")] = 64
    """Longest response, in tokens, stop token included; part of the task: cut responses are not bootstrapped."""
    stop_token_ids: Annotated[list[int] | None, at_least(0, "token ids count from 0")] = None
    """Ids that end a response. null: every eos of the generation config, else the tokenizer's; [] : none."""
    slots: Annotated[int | Literal["auto"], at_least(1, "no row could be decoded; auto chooses")] = "auto"
    """Rows that are decoded at once; auto: as many as a cycle has, up to 256 where their cache stays small, else up to
    64. Never changes a result beyond rounding."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """Of `engine: vllm` alone."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Of `engine: pool` alone."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1

    def check(self, key: str) -> None:
        for engine, section in (("vllm", self.vllm), ("pool", self.pool)):
            if self.engine != engine and section != type(section)():
                raise ConfigError(
                    f"{key}.{engine} is set with {key}.engine={self.engine}: it would be ignored. Set {key}.engine to "
                    f"{engine}, or leave {key}.{engine} out."
                )
        if self.engine == "vllm" and self.truncates and self.temperature != 1:
            raise ConfigError(
                f"{key}.temperature={self.temperature:g} with {key}.top_k={self.top_k} and {key}.top_p={self.top_p:g}: "
                "vLLM tells log-probs at a temperature only as they are after top-k and top-p, and the policy's are "
                f"those before. Set {key}.temperature to 1, or top_k to 0 and top_p to 1, or {key}.engine to local."
            )


def check_local_engine(sampling: SamplingConfig, command: str) -> None:
    """Raise ConfigError where a command that samples in its own process is asked for another engine."""
    if sampling.engine != "local":
        raise ConfigError(
            f"sampling.engine={sampling.engine}, but {command} samples in its own process: only tether ppo knows "
            "another. Leave sampling.engine out."
        )


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: Annotated[float | None, positive("nothing would be learned")] = None
    """Peak learning rate; null: 1e-5, with LoRA 1e-4; of tether dpo a tenth of either."""
    critic_lr: Annotated[float | None, positive("nothing would be learned")] = None
    """Learning rate of the critic; null: 10·lr for a head (it starts at zero), lr for a separate critic."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """After the warm-up: linear and cosine end at 0 with the last step."""
    warmup: Annotated[int, at_least(0, "a count of steps cannot be negative")] = 0
    """Optimizer steps over which lr rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, positive("Adam would divide by zero")] = 1.0e-5
    """Adam's epsilon; 1e-5 as in the original PPO code."""
    weight_decay: Annotated[float, at_least(0, "weights would grow")] = 0.0
    """Decoupled weight decay; 0: the KL is the regularizer."""
    max_grad_norm: Annotated[float, positive("every step would be zero")] = 1.0
    """Gradients are scaled down to this norm, policy and critic together."""

    def check(self, key: str) -> None:
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"{key}.betas={self.betas}: {beta} is outside [0, 1): the average would not decay.")


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """Raise ConfigError where a run of so many optimizer steps ends within its warm-up."""
    if optim.warmup >= steps:
        raise ConfigError(
            f"optim.warmup={optim.warmup} is not below the run's {steps} optimizer steps: the learning rate "
            "would never arrive. Set a shorter warm-up."
        )


@dataclass(frozen=True)
class WandbConfig(Section):
    """Weights & Biases, an extra: pip install tether[wandb]."""

    project: str = "tether"
    """Project name."""
    entity: str | None = None
    """Team or user; null: your default."""


@dataclass(frozen=True)
class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    rollouts_every: Annotated[int, at_least(0, "0 already means never")] = 1
    """Write a cycle's rollouts every so many cycles; 0 writes none."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases; null sends nothing anywhere."""


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """How often the run can be continued from."""

    every: Annotated[int, at_least(1, "the run could not be resumed")] = 50
    """Cycles (or optimizer steps, where a trainer has no cycles) between checkpoints; the last is always saved."""
    keep: Annotated[int, at_least(2, "a damaged checkpoint would have none before it")] = 2
    """Checkpoints kept, at least 2: should the newest be damaged, there is one before it."""


@dataclass(frozen=True)
class DistributedConfig(Section):
    """How a run that torchrun starts on several processes lays out its weights. Alone it does nothing."""

    shard: Literal["auto", "full", "replicate"] = "auto"
    """replicate: every process holds all weights, gradients and moments. full: each holds its part of them (FSDP2), and
    a copy to sample from. auto: full where they would take more than 16 GB a process."""
    reduce: Literal["float32"] = "float32"
    """Precision in which gradients are summed over the processes."""
    timeout_s: Annotated[float, positive("every exchange would fail at once")] = 1800.0
    """Seconds that a process waits for another in one exchange; above the longest scoring of a cycle."""


@dataclass(frozen=True)
class TrainingConfig(Config):
    """What every trainer's config has."""

    run: str
    """The run directory."""
    model: SFTModelConfig
    _: KW_ONLY
    seed: Seed = 0
    """Seed of every draw in the run."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, for bit-equal resume there; the CPU is so anyway."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def steps_per_unit(self) -> int:
        """Optimizer steps in what metrics count: in a cycle; a step is one."""
        return 1

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        """The largest microbatch: (rows, tokens in a row, tokens in a row whose log-prob is wanted), for its memory.

        longest: tokens of the longest prompt or example; None where it is not known. ranks: that share a step's rows.
        """
        raise NotImplementedError
