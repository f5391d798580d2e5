"""Whether every model beside the policy has positions for the longest prompt and response: asked before cycle 1.

Later would be too late: draws are counted, so a run that met a row too long for its reward model would meet it again
whenever it is continued. The policy's own context limits the prompts when they are read (`tether.data.limit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.config import EvaluateConfig, PPOConfig, model_paths, source_name
from tether.data.chat import encode_prompts, encode_texts
from tether.data.tokenizer import load_tokenizer
from tether.errors import ConfigError, DataError
from tether.models.loading import context_length, model_config
from tether.models.policy import companions
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


def _in_tokens_of(
    own: PreTrainedTokenizerBase, name: str, prompts: Sequence[Prompt], longest: int,
    tokenizer: PreTrainedTokenizerBase, new: int,
) -> tuple[int, int]:  # fmt: skip
    """(longest prompt, longest response) in another tokenizer's tokens.

    Prompts are counted. What will be sampled is not known: a response is taken to grow as the prompts' text does.
    """
    texts = [p.source if isinstance(p.source, str) else str(p.source[-1].get("content")) for p in prompts]
    counts = [sum(map(len, encode_texts(t, texts, special=False))) for t in (own, tokenizer)]
    ratio = max(1.0, counts[0] / max(1, counts[1]))
    try:
        encoded = encode_prompts(own, [p.source for p in prompts if not p.cut])
    except DataError as error:
        raise ConfigError(f"{name} cannot read the prompts: {error}") from error
    cut = math.ceil(longest * ratio) if any(p.cut for p in prompts) else 0
    return max([cut, *map(len, encoded)]), math.ceil(new * ratio)
