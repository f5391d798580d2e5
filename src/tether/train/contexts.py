"""Whether every model beside the policy has positions for the longest prompt and response: asked before cycle 1.

Later would be too late: draws are counted, so a run that met a row too long for its reward model would meet it again
whenever it is continued. The policy's own context limits the prompts when they are read (`tether.data.limit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.config import EvaluateConfig, PPOConfig, RewardSourceConfig, model_paths, source_name
from tether.data.chat import encode_prompts, encode_texts
from tether.data.tokenizer import load_tokenizer
from tether.errors import ConfigError, DataError
from tether.models.loading import context_length, model_config
from tether.models.policy import companions
from tether.rewards.judge import longest_question
from tether.rewards.model import same_tokens
from tether.types import Prompt


def check_contexts(
    config: PPOConfig | EvaluateConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ConfigError for the first model whose context is too short. Reads configs and tokenizers, no weights.

    prompts: every prompt that will be answered. tokenizer: the policy's.
    """
    new = config.sampling.max_new_tokens
    longest = max(len(prompt.ids) for prompt in prompts)
    if isinstance(config, PPOConfig):
        for what, other in companions(config.model).items():
            _check(what, other, longest, new)
    gold = config.evaluate.gold if isinstance(config, PPOConfig) else []
    for source in [*config.reward, *gold]:
        if source.judge is not None:
            _check_judge(source, prompts, tokenizer, new)
        for path in model_paths(source):
            name, own = f"reward model {source_name(source)}", load_tokenizer(path)
            if same_tokens(tokenizer, own):
                _check(name, model_config(path), longest, new)
            else:
                _check(name, model_config(path), *_in_tokens_of(own, name, prompts, longest, tokenizer, new))


def _check(what: str, architecture: Any, longest: int, new: int) -> None:
    context = context_length(architecture)
    if context is not None and longest + new > context:
        lower = [f"sampling.max_new_tokens to {context - longest}"] if context > longest else []
        lower += [f"prompts.max_tokens to {context - new} (with prompts.overlong: drop)"] if context > new else []
        raise ConfigError(
            f"{what} has a context of {context} tokens, but the longest prompt has {longest} tokens and up to {new} "
            f"are sampled after it: a later cycle would fail, and again whenever the run is continued. Lower "
            f"{' or '.join(lower) or 'sampling.max_new_tokens and prompts.max_tokens'}, or name a model with a longer "
            "context."
        )


def _check_judge(
    source: RewardSourceConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, new: int
) -> None:
    """Of a judge in this process; what an endpoint's context is, nobody says."""
    assert source.judge is not None
    form = source.form or "pointwise"
    asked = longest_question(source.judge, form, prompts)
    if asked is None or (context := asked[0].context) is None:
        return
    judge, longest = asked
    answers = math.ceil(new * _growth(judge.tokenizer, prompts, tokenizer)) * (2 if form == "pairwise" else 1)
    if longest + answers > context:
        raise ConfigError(
            f"reward {source_name(source)}: its judge has a context of {context} tokens, but a question about the "
            f"longest prompt has {longest}, and what is sampled up to {answers} more: a later cycle would fail, and "
            "again whenever the run is continued. Lower sampling.max_new_tokens or prompts.max_tokens (with "
            "prompts.overlong: drop), shorten the principles, or name a model with a longer context."
        )


def _growth(own: PreTrainedTokenizerBase, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens of `own` for each token of the policy's, by the text of the prompts; 1 at least."""
    texts = [p.source if isinstance(p.source, str) else str(p.source[-1].get("content")) for p in prompts]
    counts = [sum(map(len, encode_texts(t, texts, special=False))) for t in (own, tokenizer)]
    return max(1.0, counts[0] / max(1, counts[1]))


def _in_tokens_of(
    own: PreTrainedTokenizerBase, name: str, prompts: Sequence[Prompt], longest: int,
    tokenizer: PreTrainedTokenizerBase, new: int,
) -> tuple[int, int]:  # fmt: skip
    """(longest prompt, longest response) in another tokenizer's tokens.

    Prompts are counted. What will be sampled is not known: a response is taken to grow as the prompts' text does.
    """
    ratio = _growth(own, prompts, tokenizer)
    try:
        encoded = encode_prompts(own, [p.source for p in prompts if not p.cut])
    except DataError as error:
        raise ConfigError(f"{name} cannot read the prompts: {error}") from error
    cut = math.ceil(longest * ratio) if any(p.cut for p in prompts) else 0
    return max([cut, *map(len, encoded)]), math.ceil(new * ratio)
