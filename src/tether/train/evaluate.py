"""Models on prompts without training: sample from one, or compare several on the same prompts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.config import EvaluateConfig, PromptsConfig, SamplingConfig, check
from tether.data.prompts import load_prompts, prompts_of
from tether.data.table import Table
from tether.data.text import completion_text
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.errors import ConfigError, DataError, ModelError, RunError
from tether.math import Interval, best_of_n_kl_bound, best_of_n_kl_estimate, best_of_n_score, bootstrap_mean
from tether.models.ilql import load_steering
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, load_causal_lm, model_config, resolve_device, resolve_dtype
from tether.rewards import build_reward
from tether.runs import EvaluationDir, aside, short_name
from tether.runs.files import write_atomically, write_table
from tether.samplers import build_sampler
from tether.train.columns import response_columns
from tether.train.contexts import check_contexts
from tether.types import EVALUATE, GENERATE, Completions, Prompt, Rows, Sampling, Text, microbatches

_FORWARD_TOKENS = 8192  # padded tokens in one forward pass without gradient


@dataclass(frozen=True, slots=True)
class Generation:
    prompt: Text  # as it was given
    completion: str  # without its stop token, special tokens skipped
    token_ids: list[int]  # with its stop token
    finish_reason: str  # stop, or length: cut at max_new_tokens


def generate(
    model: str | Path, prompts: Sequence[Text], *, samples: int = 1, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, max_new_tokens: int = 64, seed: int = 0, device: str = "auto", dtype: str = "auto",
    stop_token_ids: list[int] | None = None, trust_remote_code: bool = False, strength: float | None = None,
) -> list[Generation]:  # fmt: skip
    """`samples` responses to each prompt, in the prompts' order.

    model: a directory or hub id. prompts: texts, or chat messages. The other names are those of `tether ppo --help`;
    strength: of the heads of `tether qlearning` with loss ilql, where the model has them; None: as it was trained with.
    Same seed, same responses: the draws behind response k to prompt i follow from (seed, i, k) alone.
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts is the text {prompts[:40]!r}: every letter would be a prompt. Give a list: [text].")
    sampling = SamplingConfig("local", temperature, top_k, top_p, max_new_tokens, stop_token_ids)
    check_dtype(dtype)
    if strength is not None and not (strength >= 0 and math.isfinite(strength)):
        raise ConfigError(f"strength={strength} is not 0 or more: the worst tokens would be preferred. Set e.g. 1.")
    anywhere = PromptsConfig("the prompts given", max_tokens=sys.maxsize)
    check(
        EvaluateConfig([str(model)], anywhere, samples=samples, seed=seed, device=device, sampling=sampling),
        reward_given=True,
    )
    if not prompts:
        return []
    source = Source(str(model), sampling, trust_remote_code, strength)
    table = Table(anywhere.path, [{"prompt": prompt} for prompt in prompts])
    asked = prompts_of(table, anywhere, source.tokenizer, **source.room)
    loaded = source.load(resolve_device(device), dtype)
    found = source.sample(loaded, asked, samples, seed=seed, stream=GENERATE)
    stop_ids = source.stop_ids(loaded)
    return [
        Generation(p.source, completion_text(source.tokenizer, ids, stop_ids), ids, reason)
        for p, ids, reason in zip(found.prompts, found.response_ids, found.finish_reasons, strict=True)
    ]


def check_dtype(dtype: str) -> None:
    """ConfigError for a precision from Python or a flag that is none."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r} is not a precision that models run in here. Set auto, float32 or bfloat16.")


@dataclass(frozen=True, slots=True)
class Result:
    """One model. Every interval is a 95 % bootstrap over prompts."""

    model: str
    score: Interval  # mean of the prompts' mean scores
    kl: Interval | None  # KL(model‖baseline) in nats per response, from the model's own samples
    win_rate: Interval | None  # share of prompts with a mean score above the baseline's, ties half; None: the baseline
    length: float  # tokens per response
    truncated: float  # share of responses cut at the length limit
    note: str | None = None  # why there is no KL; or what it is instead, where samples are truncated
    strength: float | None = None  # of its Q-learning heads (ilql); None: it has none


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Choosing the best of n of the baseline's answers, without training. Intervals as in `Result`."""

    n: int
    score: Interval  # expected score of the one that is kept
    kl: Interval  # to the baseline as it is sampled, nats per response; answers that score alike lower it
    kl_bound: float  # log n - (n-1)/n nats: the KL where no two answers score alike


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Several models on the same prompts, answered with the same random numbers."""

    baseline: str
    prompts: int
    samples: int  # responses to each prompt
    results: list[Result]  # the baseline first
    best_of: list[BestOfN]  # of the baseline, n ascending

    def __str__(self) -> str:
        rows = [("model", "score", "KL to baseline", "win rate", "length", "cut")]
        for r in self.results:
            name = short_name(r.model) + (" (baseline)" if r.model == self.baseline else "")
            intervals = _shown(r.score, ".3f"), _shown(r.kl, ".2f"), _shown(r.win_rate, ".2f")
            rows.append((name, *intervals, f"{r.length:.1f}", f"{r.truncated:.0%}"))
        for b in self.best_of:
            if b.n > 1:
                rows.append((f"best of {b.n}, baseline", _shown(b.score, ".3f"), _shown(b.kl, ".2f"), "", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [f"{short_name(r.model)}: {r.note}" for r in self.results if r.note]
        lines.append(
            f"{self.prompts} prompts, {self.samples} responses to each; [95 % intervals] over prompts; KL in nats per "
            "response"
        )
        return "\n".join(lines)


def evaluate(config: EvaluateConfig, *, reward: Callable[..., Any] | None = None, fresh: bool = False) -> Evaluation:
    """Sample from every model, score the answers, and compare with the baseline.

    reward: one more source, as in `tether.ppo`. With config.run, evaluation.json and the answers are written there,
    which `tether studio` shows side by side. fresh: move what is there to RUN.old-N first; else it is replaced.
    At most two models are in memory, the baseline and another, beside the reward sources.
    """
    check(config, reward_given=reward is not None)
    if config.run is not None:
        with _report_write_failure(config):  # before the minutes that it takes
            if fresh and Path(config.run).exists():
                Path(config.run).rename(aside(Path(config.run).absolute()))
            Path(config.run).mkdir(parents=True, exist_ok=True)
    device = resolve_device(config.device)
    sources, prompts = load_inputs(config)
    baseline = next(iter(sources))
    base = sources[baseline].load(device, config.dtype)
    results: list[Result] = []
    answers: list[dict[str, list[Any]]] = []
    base_scores = torch.empty(0)
    best_of: list[BestOfN] = []
    for name, source in sources.items():
        model = base if name == baseline else source.load(device, config.dtype)
        found = source.sample(model, prompts[name], config.samples, seed=config.seed, stream=EVALUATE)
        stop_ids = source.stop_ids(model)
        rewards = build_reward(config.reward, config.reward_shaping, source.tokenizer, stop_ids, device, reward)
        rewards.check(prompts[name])
        scored = rewards.score(found)
        scores = _by_prompt(scored.scores, config.samples)
        kl = ratios = None
        note: str | None = "its vocabulary is not the baseline's, so there is no KL between them"
        if source.tokenizer.get_vocab() == sources[baseline].tokenizer.get_vocab():
            asked = [p for p in prompts[baseline] for _ in range(config.samples)]
            ratios = _log_ratios(model, base, found, asked, config.sampling.temperature)
            kl, note = _by_prompt(ratios, config.samples), _truncation(config.sampling)
            if (
                base.steer is not None and ratios.isinf().any()
            ):  # the baseline is steered, and chooses among its likeliest tokens
                kl = ratios = None
                note = "some of its answers never come from the baseline's likeliest tokens (ilql): the KL is infinite"
        columns = response_columns(found, scored, source.tokenizer, stop_ids, responses_per_prompt=config.samples)
        answers.append(columns | {"kl": [None] * len(found) if ratios is None else ratios.tolist()})
        if name == baseline:
            base_scores = scores
            best_of = _best_of(scored.scores.view(-1, config.samples), config)
        wins = (scores > base_scores).double() + 0.5 * (scores == base_scores)
        interval = partial(bootstrap_mean, seed=config.seed)
        results.append(
            Result(
                model=name,
                score=interval(scores),
                kl=None if kl is None else interval(kl),
                win_rate=None if name == baseline else interval(wins),
                length=sum(found.lengths) / len(found),
                truncated=found.finish_reasons.count("length") / len(found),
                note=None if name == baseline else note,
                strength=getattr(model.steer, "strength", None),
            )
        )
        del model, rewards  # before the next ones are loaded
    evaluation = Evaluation(baseline, len(prompts[baseline]), config.samples, results, best_of)
    if config.run is not None:
        _write(evaluation, answers, config, EvaluationDir(config.run))
    return evaluation


def load_inputs(config: EvaluateConfig) -> tuple[dict[str, Source], dict[str, list[Prompt]]]:
    """(the models, the baseline first; the prompts as each of them reads them). Loads no weights."""
    names = dict.fromkeys([config.baseline or config.models[0], *config.models])
    sources = {name: Source(name, config.sampling, config.trust_remote_code) for name in names}
    prompts = _common({name: load_prompts(config.prompts, s.tokenizer, **s.room) for name, s in sources.items()})
    for name, source in sources.items():
        check_contexts(config, prompts[name], source.tokenizer)
    return sources, prompts


def _truncation(s: SamplingConfig) -> str | None:
    """What the KL column is where samples leave out the tail of the distribution that they are weighed by."""
    if not s.top_k and s.top_p == 1:
        return None
    return (
        f"answers are drawn with top_k={s.top_k}, top_p={s.top_p:g}, so the column is the mean of log(model/baseline) "
        "over truncated samples, which is not the KL of the models; sampling.top_k 0 and sampling.top_p 1 give that"
    )


@torch.no_grad()
def _log_ratios(
    model: LanguageModel, baseline: LanguageModel, found: Completions, asked: Sequence[Prompt], temperature: float
) -> Tensor:
    """[B] Σ log(model/baseline) over each response, in nats.

    asked: the baseline's own encoding of each prompt: under another chat template the same answer follows other ids.
    """
    if model is baseline:
        return torch.zeros(len(found), dtype=torch.float64)
    theirs = Rows.of([p.ids for p in asked], found.response_ids)
    if model.steer is None:
        ours = _summed_logprobs(model, found.rows(), temperature)
    else:  # computed again, rounding could put a token just outside of the likeliest ones, and say that it never comes
        ours = torch.tensor([sum(row) for row in found.sampler_logprobs], dtype=torch.float64)
    return ours - _summed_logprobs(baseline, theirs, temperature)


def _summed_logprobs(model: LanguageModel, rows: Rows, temperature: float) -> Tensor:
    """[B] log-probability of each response, in nats."""
    rows = rows.to(model.device)
    sums = torch.zeros(len(rows), dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    for index in microbatches(rows.prompt_lengths + rows.response_lengths, _FORWARD_TOKENS):
        part = rows.select(index)
        logprobs, _, _ = model.response_logprobs(part, temperature=temperature, entropy=False)
        sums.index_add_(0, index.cpu()[part.before_targets[0].cpu()], logprobs.cpu().double())
    return sums


def _by_prompt(values: Tensor, samples: int) -> Tensor:
    """[P] means over the `samples` responses to each prompt, of values [P · samples]."""
    return values.double().view(-1, samples).mean(1)


def _best_of(scores: Tensor, config: EvaluateConfig) -> list[BestOfN]:
    """What choosing among the answers to each prompt gives, from scores [P, samples]."""
    interval = partial(bootstrap_mean, seed=config.seed)
    return [
        BestOfN(
            n=n,
            score=interval(best_of_n_score(scores, n=n)),
            kl=interval(best_of_n_kl_estimate(scores, n=n)),
            kl_bound=best_of_n_kl_bound(n),
        )
        for n in config.best_of_sizes
    ]


def _common(prompts: dict[str, list[Prompt]]) -> dict[str, list[Prompt]]:
    """The prompts that every model takes: tokenizers differ, and so does what is too long for a context."""
    kept = set.intersection(*({p.row for p in found} for found in prompts.values()))
    if not kept:
        raise DataError("no prompt fits every model: nothing could be compared. Raise prompts.max_tokens.")
    most = max(len(found) for found in prompts.values())
    if len(kept) < most:
        print(f"{most - len(kept)} prompts are too long for one of the models: left out for all", file=sys.stderr)
    return {name: [p for p in found if p.row in kept] for name, found in prompts.items()}


def _write(
    evaluation: Evaluation, answers: Sequence[dict[str, list[Any]]], config: EvaluateConfig, there: EvaluationDir
) -> None:
    """The answers first, the file that names their models last: a reader never sees one beside the other's."""
    with _report_write_failure(config, evaluation):
        folder = there.file(0).parent
        folder.mkdir(parents=True, exist_ok=True)
        there.index_file.unlink(missing_ok=True)
        for old in folder.glob("model-*.parquet"):
            old.unlink()
        for index, columns in enumerate(answers):
            write_table(there.file(index), columns)
        content = {"schema": 1, **asdict(evaluation), "config": asdict(config)}
        write_atomically(there.index_file, json.dumps(content, indent=2) + "\n")


@contextmanager
def _report_write_failure(config: EvaluateConfig, evaluation: Evaluation | None = None) -> Iterator[None]:
    """Where writing fails, print what was found, since it took a while, and raise a RunError that names the place."""
    try:
        yield
    except (OSError, RunError) as error:
        if evaluation is not None:
            print(evaluation)
        cause = error if isinstance(error, OSError) else error.__cause__
        raise RunError(
            f"run={config.run} cannot be written ({getattr(cause, 'strerror', None) or cause}): "
            f"{'the results above are' if evaluation else 'the results would be'} in no file. Name a directory that is "
            "writable, on a disk with room."
        ) from error


# ---------------------------------------------------------------- a model and what surrounds it


class Source:
    """A model that need not be loaded yet: its tokenizer and its config answer what can be answered early."""

    def __init__(
        self, path: str, sampling: SamplingConfig, trust_remote_code: bool, strength: float | None = None
    ) -> None:
        self.path, self.sampling, self.trust_remote_code, self.strength = path, sampling, trust_remote_code, strength
        self.config = model_config(path, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        check_vocabulary(self.tokenizer, self.config.get_text_config().vocab_size)

    @property
    def room(self) -> dict[str, Any]:
        """What limits a prompt."""
        return {"context": context_length(self.config), "max_new_tokens": self.sampling.max_new_tokens}

    def load(self, device: torch.device, dtype: str) -> LanguageModel:
        resolved = resolve_dtype(dtype, device, self.config)
        lm = load_causal_lm(self.path, dtype=resolved, device=device, trust_remote_code=self.trust_remote_code)
        model = LanguageModel(lm.eval().requires_grad_(False), resolved)
        model.steer = steer = load_steering(
            self.path, width=model.config.hidden_size, vocabulary=model.config.vocab_size, device=device,
            strength=self.strength,
        )  # fmt: skip
        if steer is None and self.strength is not None:
            raise ConfigError(
                f"strength={self.strength:g} with {self.path}, which has no heads of Q-learning (ilql/) beside it: "
                "it would be ignored. Leave it out."
            )
        if steer is not None:
            _say(f"{self.path}: sampled with its Q-learning heads, strength {steer.strength:g}, top_k {steer.top_k}")
        _say(model.check_head(), _unlike_its_own(self.path, lm.generation_config, self.sampling))
        if steer is not None and model.use_full_logits:
            raise ModelError(
                f"{self.path}: Q-learning heads (ilql/) beside a model whose output head is not a plain linear layer: "
                "they could not steer it. Remove ilql/ to sample from the language model alone."
            )
        return model

    def stop_ids(self, model: LanguageModel) -> tuple[int, ...]:
        return stop_token_ids(self.tokenizer, model.hf_model.generation_config, self.sampling.stop_token_ids)

    def sample(
        self, model: LanguageModel, prompts: Sequence[Prompt], samples: int, *, seed: int, stream: int
    ) -> Completions:
        s = self.sampling
        sampler, notes = build_sampler(model, s)
        _say(*notes)
        drawn = Sampling(s.temperature, s.top_k, s.top_p, s.max_new_tokens, self.stop_ids(model), samples, seed, stream)
        return sampler.generate(prompts, drawn, cycle=0)


def _unlike_its_own(path: str, own: Any, used: SamplingConfig) -> str | None:
    """What the model's generation_config asks for and is not done: transformers' `generate` would do it.

    Samples are drawn as the command says, the same for every model, so that they can be compared, and scored as PPO
    would see them.
    """
    wanted = {name: getattr(own, name, None) for name in ("temperature", "top_k", "top_p")}
    if getattr(own, "do_sample", None) and wanted["top_k"] is None:
        wanted["top_k"] = 50  # transformers' default where it samples
    differ = [f"{name} {value:g}" for name, value in wanted.items() if value not in (None, getattr(used, name))]
    for name, off in (("repetition_penalty", 1.0), ("min_p", 0.0), ("no_repeat_ngram_size", 0)):
        if (value := getattr(own, name, None)) not in (None, off):
            differ.append(f"{name} {value:g} (which Tether does not have)")
    if not differ:
        return None
    return (
        f"{path}: its generation_config asks for {', '.join(differ)}; sampling at temperature {used.temperature:g}, "
        f"top_k {used.top_k}, top_p {used.top_p:g}. Set those to sample as transformers would."
    )


def _say(*notes: str | None) -> None:
    for note in filter(None, notes):
        print(note, file=sys.stderr)


def _shown(interval: Interval | None, form: str) -> str:
    return "–" if interval is None else f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
