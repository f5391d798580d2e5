"""Responses as rows of a table: what rollouts/ and evaluations/ hold (run directory schema 1), and answers/."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from tether.config import PPOSection
from tether.data.text import completion_text, fragments
from tether.rewards import ScoredBatch
from tether.train.rollout import Experience
from tether.types import Completions, Text


def response_columns(
    completions: Completions, scored: ScoredBatch, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...],
    *, responses_per_prompt: int,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns of B rows, one a response: what was asked, answered and scored, without a number for each token."""
    return {
        "prompt_index": [p.row for p in completions.prompts],
        "response_index": [i % responses_per_prompt for i in range(len(completions))],
        "prompt": [_as_text(p.source) for p in completions.prompts],
        "completion": [completion_text(tokenizer, ids, stop_ids) for ids in completions.response_ids],
        "finish_reason": completions.finish_reasons,
        "length": completions.lengths,
        "score": scored.scores.tolist(),
        **{f"score/{name}": list(answers) for name, answers in scored.parts.items()},
    }


def table(
    experience: Experience, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], ppo: PPOSection,
    *, cycle: int, responses_per_prompt: int, new_logprobs: Tensor | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns of B rows, one a response; per-token columns are lists as long as the response.

    new_logprobs [B, R]: of the last epoch's own passes; in evaluations there are none, and their columns are lists of
    nulls.
    """
    completions, rollout = experience.completions, experience.rollout
    lengths = completions.lengths

    def ragged(values: Tensor) -> list[list[Any]]:
        return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]

    next_values = pad(rollout.values[:, 1:], (0, 1))  # 0 after the last counted token: values are 0 outside the mask
    columns: dict[str, list[Any]] = {
        "cycle": [cycle] * len(completions),
        **response_columns(
            completions, experience.scored, tokenizer, stop_ids, responses_per_prompt=responses_per_prompt
        ),
        "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(1).tolist(),
        "token_id": completions.response_ids,
        "text": [fragments(tokenizer, ids, stop_ids) for ids in completions.response_ids],
        "sampler_logprob": completions.sampler_logprobs,
        "old_logprob": ragged(rollout.old_logprobs),
        "ref_logprob": ragged(rollout.ref_logprobs),
        "value": ragged(rollout.values),
        "reward": ragged(rollout.rewards),
        "delta": ragged(rollout.rewards + ppo.gamma * next_values - rollout.values),
        "advantage": ragged(experience.advantages),
        "return": ragged(rollout.returns),
        "entropy": ragged(experience.entropy),
    }
    if new_logprobs is None:
        return columns | {name: [[None] * n for n in lengths] for name in ("new_logprob", "ratio", "clipped")}
    ratio = (new_logprobs - rollout.old_logprobs).exp()
    low, high = ppo.clips
    a = rollout.advantages
    return columns | {
        "new_logprob": ragged(new_logprobs),
        "ratio": ragged(ratio),
        "clipped": ragged(((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))),
    }


def _as_text(source: Text) -> str:
    """A prompt as one string; messages as JSON."""
    return source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
