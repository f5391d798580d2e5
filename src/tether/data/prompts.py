"""Prompts for PPO, evaluation and generation."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tether.config import PromptsConfig
from tether.data.cells import as_prompt
from tether.data.columns import encode_prompt_column
from tether.data.limit import Limit, keep_right
from tether.data.table import Table, read_table
from tether.types import Prompt


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, context: int | None, max_new_tokens: int
) -> list[Prompt]:
    """Every prompt of a data set, tokenized.

    context: tokens that the model has positions for, None for no limit; a prompt leaves max_new_tokens of them free.
    """
    table = read_table(config.path, config.split, config.limit)
    return prompts_of(table, config, tokenizer, context=context, max_new_tokens=max_new_tokens)


def prompts_of(
    table: Table,
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
) -> list[Prompt]:
    table.require(["prompt"], '{"prompt": "…"}')
    names = dict.fromkeys(name for row in table.rows for name in row if name != "prompt")
    sources = table.cells("prompt", as_prompt)
    ids = encode_prompt_column(table, sources, tokenizer, config.chat_template_kwargs)
    limit = Limit.of_prompts(config, context, max_new_tokens)
    kept = limit.apply(table, "prompt", [len(x) for x in ids])
    return [
        Prompt(
            ids=tuple(keep_right(ids[i], limit.tokens, tokenizer)),
            source=sources[i],
            row=i,
            columns={name: table.rows[i].get(name) for name in names},
            cut=len(ids[i]) > limit.tokens,
        )
        for i in kept
    ]
