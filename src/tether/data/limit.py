"""What happens to rows that are too long."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tether.config import DataConfig, PromptsConfig
from tether.data.table import Table
from tether.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Limit:
    """How many tokens a row may have, where that comes from, and what happens to a longer one."""

    tokens: int
    reason: str
    overlong: str
    section: str  # of the config, as the user writes it
    remedy: str = "Raise the limit"

    @classmethod
    def of_prompts(cls, config: PromptsConfig, context: int | None, max_new_tokens: int) -> Limit:
        room = config.max_tokens if context is None else context - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"sampling.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{context} tokens. Set it below {context}."
            )
        if room < config.max_tokens:
            reason = f"the model's context of {context} less sampling.max_new_tokens={max_new_tokens}"
            return cls(room, reason, config.overlong, "prompts", "Lower sampling.max_new_tokens")
        return cls(config.max_tokens, f"prompts.max_tokens={config.max_tokens}", config.overlong, "prompts")

    @classmethod
    def of_data(cls, config: DataConfig, context: int | None) -> Limit:
        if context is not None and context < config.max_tokens:
            return cls(context, f"the model's context of {context}", config.overlong, "data")
        return cls(config.max_tokens, f"data.max_tokens={config.max_tokens}", config.overlong, "data")

    def apply(self, table: Table, column: str, lengths: list[int]) -> list[int]:
        """The rows to keep. Says on stderr how many are dropped or cut; raises where neither was asked for."""
        over = [i for i, length in enumerate(lengths) if length > self.tokens]
        if not over:
            return list(range(len(lengths)))
        how_many = f"{len(over)} of {len(lengths)} rows are longer than {self.tokens} tokens ({self.reason})"
        if self.overlong == "error":
            with_prompt = "" if self.section == "prompts" else ", prompt included"
            raise table.error(
                over[0],
                column,
                f"has {lengths[over[0]]} tokens{with_prompt}; {how_many}, the longest has {max(lengths)}. "
                f"{self.remedy}, shorten them, or set {self.section}.overlong to cut_left or drop.",
            )
        if self.overlong == "cut_left":
            print(f"{table.path}: {how_many}: cut on the left", file=sys.stderr)
            return list(range(len(lengths)))
        if len(over) == len(lengths):
            raise DataError(
                f"{table.path}: {how_many}, and {self.section}.overlong is drop: nothing would be left. "
                f"{self.remedy}, or set cut_left."
            )
        print(f"{table.path}: {how_many}: dropped", file=sys.stderr)
        gone = set(over)
        return [i for i in range(len(lengths)) if i not in gone]

    def warn_truncated(self, table: Table, torn: int) -> None:
        """Say on stderr how many rows lost more than a part of their prompt."""
        if torn:
            print(f"{table.path}: {torn} of them lost some of what is to be learned, not only prompt", file=sys.stderr)

    def drop_identical(self, table: Table, alike: int, *, left: int) -> None:
        """Say on stderr how many pairs are dropped because the cut took all that told their answers apart."""
        if alike:
            what = f"{table.path}: {alike} of them hold the same answer twice once cut to {self.tokens} tokens"
            if not left:
                raise DataError(f"{what}, and no pair is left: nothing could be preferred. Raise the limit.")
            print(f"{what}: dropped", file=sys.stderr)


def keep_right(ids: list[int], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `tokens` ids; a bos stays in front, where the model has always seen one."""
    if len(ids) <= tokens:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and tokens > 1 else []
    return head + ids[len(ids) - tokens + len(head) :]
