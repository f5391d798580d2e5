"""Where scores come from: functions, reward models, ensembles of them, servers and judges, weighted and summed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from tether.config import RESERVED_NAMES, RewardShapingConfig, RewardSourceConfig, source_name
from tether.errors import ConfigError
from tether.rewards.combine import RewardSet, ScoredBatch, shape_scores
from tether.rewards.ensemble import EnsembleReward
from tether.rewards.function import FunctionReward, ObjectReward, function_file, load_function
from tether.rewards.judge import JudgeReward
from tether.rewards.model import ModelReward
from tether.rewards.url import UrlReward
from tether.runs.answers import KeptAnswers
from tether.types import Reward


def build_reward(
    sources: Sequence[RewardSourceConfig],
    shaping: RewardShapingConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    device: torch.device,
    given: Callable[..., Any] | Reward | None = None,
    kept: Path | None = None,
) -> RewardSet:
    """Load every source. Functions come first: a typo in one is found before a model is loaded.

    tokenizer, stop_ids: the policy's. given: one more source, passed from Python, with weight 1: a function, or
    an object with the methods of `Reward`, called by its `name` or that of its class. kept: the file that keeps what
    other machines answer.
    """
    built: dict[str, tuple[Reward, float]] = {}
    policy: dict[str, Any] = {"tokenizer": tokenizer, "stop_ids": stop_ids}
    for source in sorted(sources, key=lambda s: s.function is None):
        name = source_name(source)
        scorer: Reward
        if source.function is not None:
            scorer = FunctionReward(
                load_function(source.function), name=name, timeout_s=source.timeout_s, fixed=source.arguments, **policy
            )
        elif source.models is not None:
            scorer = EnsembleReward(
                source.models, name=name, pessimism=source.pessimism, dtype=source.dtype, device=device, **policy
            )
        elif source.url is not None:
            scorer = url_reward(source, tokenizer, stop_ids)
        elif source.judge is not None:
            scorer = judge_reward(source, tokenizer, stop_ids, kept)
        else:
            assert source.model is not None
            scorer = ModelReward(source.model, name=name, dtype=source.dtype, device=device, **policy)
        built[name] = (scorer, source.weight)
    if given is not None:
        is_object = hasattr(given, "check") and hasattr(given, "score")
        name = getattr(given, "name", type(given).__name__) if is_object else getattr(given, "__name__", "reward")
        name = "reward" if name in (*RESERVED_NAMES, "<lambda>") else name
        if name in built:
            raise ConfigError(
                f"reward={name} has the name of a source in the config's reward list: their metrics would overwrite "
                "each other. Set `name` of the one in the list."
            )
        if is_object:
            scorer = ObjectReward(cast(Reward, given), name=name)
        else:
            function = cast(Callable[..., Any], given)
            scorer = FunctionReward(function, name=name, timeout_s=threading.TIMEOUT_MAX, **policy)
        built[name] = (scorer, 1.0)
    order = [*(source_name(s) for s in sources), *built]  # as the config lists them, in metrics and rollouts too
    optional = {source_name(s) for s in sources if s.optional}
    return RewardSet({name: built[name] for name in order}, shaping, optional, KeptAnswers(kept) if kept else None)


def url_reward(source: RewardSourceConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> UrlReward:
    """A source that is a URL. ConfigError where its key is not in the environment."""
    assert source.url is not None
    return UrlReward(
        source.url, name=source_name(source), key_env=source.key_env, timeout_s=source.timeout_s, probe=source.probe,
        tokenizer=tokenizer, stop_ids=stop_ids,
    )  # fmt: skip


def judge_reward(
    source: RewardSourceConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], kept: Path | None = None
) -> JudgeReward:
    """A source that is a judge; no weights are loaded yet. kept: see `build_reward`."""
    assert source.judge is not None
    return JudgeReward(
        source.judge, name=source_name(source), form=source.form or "pointwise", optional=source.optional, kept=kept,
        tokenizer=tokenizer, stop_ids=stop_ids,
    )  # fmt: skip
