"""Responses as rows of a table: what rollouts/ and evaluations/ hold (run directory schema 1), and answers/."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from tether.config import PPOConfig, PPOSection
from tether.data.text import completion_text, fragments
from tether.errors import TrainingError
from tether.rewards import ScoredBatch
from tether.runs import RunDirectory
from tether.train.rollout import Experience
from tether.types import Completions


def response_columns(
    completions: Completions, scored: ScoredBatch, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...],
    *, responses_per_prompt: int,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns of B rows, one per response: what was asked, answered and scored, without a number for each token."""
    return {
        "prompt_index": [p.row for p in completions.prompts],
        "response_index": [i % responses_per_prompt for i in range(len(completions))],
        "prompt": [
            p.source if isinstance(p.source, str) else json.dumps(p.source, ensure_ascii=False)
            for p in completions.prompts
        ],
        "completion": [completion_text(tokenizer, ids, stop_ids) for ids in completions.response_ids],
        "finish_reason": completions.finish_reasons,
        "length": completions.lengths,
        "score": scored.scores.tolist(),
        **{f"score/{name}": list(answers) for name, answers in scored.parts.items()},
        **{f"disagreement/{name}": found for name, found in scored.disagreement.items()},
        **{f"members/{name}": found for name, found in scored.members.items()},
    }


def rollout_columns(
    experience: Experience, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], ppo: PPOSection,
    *, cycle: int, responses_per_prompt: int, new_logprobs: Tensor | None = None, min_q: Tensor | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns of B rows, one per response; per-token columns are lists as long as the response.

    new_logprobs [B, R]: of the last epoch's own passes; in evaluations there are none, and their columns hold nulls.
    min_q [B, R]: of implicit Q-learning, which has no reference to measure a KL to.
    """
    completions, rollout = experience.completions, experience.rollout
    lengths = completions.lengths

    def ragged(values: Tensor) -> list[list[Any]]:
        return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]

    of_critic: dict[str, list[Any]] = {}
    if rollout.values is not None and rollout.returns is not None:
        next_values = pad(rollout.values[:, 1:], (0, 1))  # 0 after the last token: values are 0 outside the mask
        delta = rollout.rewards + ppo.gamma * next_values - rollout.values
        of_critic = {"value": ragged(rollout.values), "delta": ragged(delta), "return": ragged(rollout.returns)}
    responses = response_columns(
        completions, experience.scored, tokenizer, stop_ids, responses_per_prompt=responses_per_prompt
    )
    columns: dict[str, list[Any]] = {
        "cycle": [cycle] * len(completions),
        **responses,
        "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(1).tolist(),
        "prompt_token_id": [list(p.ids) for p in completions.prompts],
        "token_id": completions.response_ids,
        "text": [fragments(tokenizer, ids, stop_ids) for ids in completions.response_ids],
        "sampler_logprob": completions.sampler_logprobs,
        "old_logprob": ragged(rollout.old_logprobs),
        "ref_logprob": ragged(rollout.ref_logprobs),
        "reward": ragged(rollout.rewards),
        "advantage": ragged(experience.advantages),
        **of_critic,
        "entropy": ragged(experience.entropy),
    }
    if min_q is not None:
        del columns["ref_logprob"], columns["return"]
        columns |= {"kl": [None] * len(completions), "q": ragged(min_q)}
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


@dataclass(frozen=True, slots=True)
class Record:
    """Writes responses and what was computed of them into the run directory."""

    run: RunDirectory
    config: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    def rollouts(self, experience: Experience, cycle: int, new_logprobs: Tensor) -> None:
        """The cycle's rollout file, when the config asks for one."""
        every = self.config.log.rollouts_every
        if every and (cycle % every == 0 or cycle == 1) and not self.run.follows:
            self.run.write_rollouts(cycle, self._columns(experience, cycle, new_logprobs))

    def evaluation(self, experience: Experience, cycle: int, gold: Mapping[str, Sequence[float | None]]) -> None:
        """gold: name of a gold source -> its score of each response."""
        if self.run.follows:
            return
        columns = self._columns(experience, cycle, samples=self.config.evaluate.samples)
        self.run.write_evaluation(cycle, columns | {f"gold/{name}": list(found) for name, found in gold.items()})

    @contextmanager
    def left_behind(self, experience: Experience, cycle: int) -> Iterator[None]:
        """An update that breaks leaves the cycle's rollout behind, to look at."""
        try:
            yield
        except TrainingError:
            self.run.write_rollouts(cycle, self._columns(experience, cycle))
            raise

    def _columns(
        self, experience: Experience, cycle: int, new_logprobs: Tensor | None = None, samples: int | None = None
    ) -> dict[str, list[Any]]:
        ppo = self.config.ppo
        return rollout_columns(
            experience, self.tokenizer, self.stop_ids, ppo, cycle=cycle, new_logprobs=new_logprobs,
            responses_per_prompt=samples or ppo.responses_per_prompt,
        )  # fmt: skip
