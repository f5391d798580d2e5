"""`tether generate --best-of N`: answers drawn and scored, and what is kept: the best, or best against worst."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.config import EvaluateConfig, PromptsConfig, RewardSourceConfig, SamplingConfig, check
from tether.models.loading import resolve_device
from tether.rewards import build_reward
from tether.rewards.function import read_answers
from tether.train.evaluate import check_dtype, load_inputs
from tether.types import GENERATE, Text


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """The n answers to one prompt, in the order they were drawn."""

    prompt: Text  # as it stands in the file
    answers: list[Text]  # without stop token; the assistant's message where the prompt is messages
    finish_reasons: list[str]  # stop, or length: cut at max_new_tokens
    scores: list[float]

    @property
    def best(self) -> int:
        """The answer with the highest score; of several the one drawn first, which is any of them by chance."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def worst(self) -> int:
        """The answer with the lowest score; of several the one drawn first."""
        return min(range(len(self.scores)), key=self.scores.__getitem__)


def best_of_n(
    model: str | Path, prompts: str | Path, *, n: int, reward: str | Callable[..., Any], temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, max_new_tokens: int = 64, seed: int = 0, device: str = "auto",
    dtype: str = "auto", stop_token_ids: list[int] | None = None, trust_remote_code: bool = False,
) -> list[ScoredAnswers]:  # fmt: skip
    """n answers to each prompt of a file, scored; `winners` and `pairs` choose among them.

    prompts: JSONL or Parquet with a column `prompt`; other columns go to a reward function. reward: a function,
    FILE.py:NAME or package.module:NAME of one, the YAML file of a judge, or the directory or hub id of a reward model.
    The other names are those
    of `tether.generate`, and the same seed draws the same answers.
    """
    check_dtype(dtype)
    listed, given = ([reward_source(reward)], None) if isinstance(reward, str) else ([], reward)
    config = EvaluateConfig(
        [str(model)], PromptsConfig(str(prompts), max_tokens=sys.maxsize), listed,
        samples=n, seed=seed, device=device, trust_remote_code=trust_remote_code,
        sampling=SamplingConfig("local", temperature, top_k, top_p, max_new_tokens, stop_token_ids),
    )  # fmt: skip
    check(config, reward_given=given is not None)
    sources, asked = load_inputs(config)
    (source,), (questions,) = sources.values(), asked.values()
    on = resolve_device(device)
    loaded = source.load(on, dtype)
    stop_ids = source.stop_ids(loaded)
    scorer = build_reward(config.reward, config.reward_shaping, source.tokenizer, stop_ids, on, given)
    scorer.check(questions)
    found = source.sample(loaded, questions, n, seed=seed, stream=GENERATE)
    scores = scorer.score(found).scores.tolist()
    answers = read_answers(found, source.tokenizer, stop_ids)
    return [
        ScoredAnswers(q.source, answers[i : i + n], found.finish_reasons[i : i + n], scores[i : i + n])
        for q, i in zip(questions, range(0, len(found), n), strict=True)
    ]


def reward_source(name: str) -> RewardSourceConfig:
    """The source that `--reward` names: a function where it is FILE.py:NAME or package.module:NAME, a judge where it is
    a YAML file, else a model."""
    if name.endswith((".yaml", ".yml")):
        return RewardSourceConfig(judge=name)
    module, _, function = name.rpartition(":")
    is_function = bool(module and function) and not Path(name).exists()
    if is_function:
        return RewardSourceConfig(function=name, name="reward")  # `score` would be a metric's name in a run
    return RewardSourceConfig(model=name)


def winners(scored: Sequence[ScoredAnswers]) -> list[dict[str, Any]]:
    """The best answer to each prompt, as rows that `tether sft` reads."""
    return [
        {
            "prompt": s.prompt,
            "completion": s.answers[s.best],
            "finish_reason": s.finish_reasons[s.best],
            "score": s.scores[s.best],
            "score_mean": sum(s.scores) / len(s.scores),
        }
        for s in scored
    ]


def pairs(scored: Sequence[ScoredAnswers]) -> list[dict[str, Any]]:
    """Best against worst, as rows that `tether reward` and `tether dpo` read.

    None of a prompt whose answers all score alike, or whose best and worst read alike: there is nothing to prefer.
    """
    return [
        {
            "prompt": s.prompt,
            "chosen": s.answers[s.best],
            "rejected": s.answers[s.worst],
            "chosen_finish_reason": s.finish_reasons[s.best],
            "rejected_finish_reason": s.finish_reasons[s.worst],
            "chosen_score": s.scores[s.best],
            "rejected_score": s.scores[s.worst],
        }
        for s in scored
        if s.scores[s.best] > s.scores[s.worst] and s.answers[s.best] != s.answers[s.worst]
    ]
