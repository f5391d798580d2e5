"""Scores from a reward model, with its own tokenizer and chat template if they differ from the policy's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tether.data.chat import encode_prompts
from tether.data.columns import encode_answers
from tether.data.tokenizer import load_tokenizer, stop_token_ids
from tether.errors import DataError, RewardError
from tether.models.loading import context_length, model_config, resolve_dtype
from tether.models.reward_model import load_reward_model
from tether.rewards.function import describe_row, read_answers
from tether.types import Completions, Prompt, Text


class ModelReward:
    """One reward model as a source of scores: normalized, without gradient."""

    def __init__(
        self,
        path: str,
        *,
        name: str,
        dtype: str,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
    ) -> None:
        """path: a directory or hub id. tokenizer, stop_ids: the policy's."""
        self.model = load_reward_model(path, dtype=resolve_dtype(dtype, device, model_config(path)), device=device)
        self.model.requires_grad_(False)
        self.name = name
        self._model_tokenizer, self._tokenizer, self._stop_ids = load_tokenizer(path), tokenizer, stop_ids
        self.same_tokens = same_tokens(tokenizer, self._model_tokenizer)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError where the model could not be shown what the policy saw of a prompt."""
        for prompt in prompts:
            if prompt.cut and not self.same_tokens and not isinstance(prompt.source, str):
                raise RewardError(
                    f"reward model {self.name} has another tokenizer or chat template than the policy, and the "
                    f"messages in row {prompt.row} of the data are too long and were cut: half a conversation cannot "
                    "be written in another template, so it would judge what the policy never saw. Set "
                    "prompts.overlong: drop, or raise prompts.max_tokens."
                )

    def score(self, completions: Completions) -> list[float | None]:
        """B scores. The policy's ids go straight through where the tokenizers agree: nothing is tokenized twice."""
        if self.same_tokens:
            rows = [[*p.ids, *ids] for p, ids in zip(completions.prompts, completions.response_ids, strict=True)]
        else:
            rows = self._encode_again(completions)
        longest = context_length(self.model.classifier.config)
        for i, row in enumerate(rows):
            if longest is not None and len(row) > longest:
                raise RewardError(
                    f"reward model {self.name} has positions for {longest} tokens, but {describe_row(completions, i)} "
                    f"and its completion are {len(row)}: the end would not be seen. Lower "
                    "sampling.max_new_tokens or prompts.max_tokens, or use a reward model with a longer context."
                )
        scores = self.model.score(rows)
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0, 0])
            raise RewardError(
                f"reward model {self.name} gives {scores[bad].item()} for {describe_row(completions, bad)}: one such "
                "score would make every weight NaN. Its weights or its normalization are damaged, or dtype is too "
                "coarse: set dtype: float32 for this source."
            )
        return scores.double().tolist()

    def _encode_again(self, completions: Completions) -> list[list[int]]:
        """The same text in the model's own tokens, as in its training; its stop token only where the policy set one."""
        self.check(completions.prompts)
        tokenizer = self._model_tokenizer
        sources = [self._seen(prompt) for prompt in completions.prompts]
        answers = read_answers(completions, self._tokenizer, self._stop_ids)
        stop = next(iter(stop_token_ids(tokenizer, self.model.classifier.config, None)), None)
        cut = [reason == "length" for reason in completions.finish_reasons]
        encoded = encode_answers(sources, answers, tokenizer, stop, None, partial(self._at, completions), cut=cut)
        prompts = encode_prompts(tokenizer, sources)
        return [prompt + answer for prompt, answer in zip(prompts, encoded, strict=True)]

    def _seen(self, prompt: Prompt) -> Text:
        """A prompt as the policy saw it: of a text whose beginning was cut, what its ids say."""
        if not prompt.cut:
            return prompt.source
        ids = prompt.ids[1:] if prompt.ids[0] == self._tokenizer.bos_token_id else prompt.ids
        text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.lstrip("\ufffd")  # what is left of a character that was cut through

    @contextmanager
    def _at(self, completions: Completions, row: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise RewardError(
                f"reward model {self.name} cannot read {describe_row(completions, row)}: {error}"
            ) from error


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids of one mean the same to the other: vocabulary, chat template, and how a text becomes ids."""
    return _meaning(a) == _meaning(b)


def tokens_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal where `same_tokens` is true: what two machines compare."""
    return hashlib.sha256(json.dumps(_meaning(tokenizer), sort_keys=True).encode()).hexdigest()


def _meaning(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    probe = "It's 3.14 o'clock —\n\n  naïve “quotes”, tabs\tand 東京 🙂."
    return [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer(probe).input_ids]
