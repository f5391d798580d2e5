"""Examples for supervised training: what to imitate, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from tether.config import DataConfig
from tether.data.cells import as_answer, as_messages, as_prompt, as_text
from tether.data.chat import encode_conversations, encode_texts
from tether.data.columns import encode_answers, encode_prompt_column, read_cut, stopped
from tether.data.limit import Limit, keep_right
from tether.data.table import listed, read_table
from tether.data.text import without_stop
from tether.errors import DataError, did_you_mean


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence to imitate in part."""

    ids: list[int]
    trained: list[bool]  # as long as ids; never the first, which nothing predicts; True at least once
    row: int  # its row in the data set, from 0


def load_examples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_id: int | None,
    train_on: str = "completion",
    context: int | None = None,
) -> list[Example]:
    """Every example of a data set, tokenized, in the first of the forms messages · prompt, completion · text.

    stop_id: appended to what is learned, and learned, where it does not stand there yet; not to an example whose
    `finish_reason` is length. train_on: completion, or all for every token. context: the model's positions, None for no
    limit.
    """
    table = read_table(config.path, config.split, config.limit)
    columns, kwargs = table.rows[0], config.chat_template_kwargs
    encoded: list[tuple[list[int], list[bool]]]  # ids and trained, of every row
    if "messages" in columns:
        column = "messages"
        example = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        table.require([column], example)
        conversations = table.cells(column, as_messages)
        at = partial(table.at, column=column)
        encoded = encode_conversations(tokenizer, conversations, at, stop_id=stop_id, kwargs=kwargs)
    elif "prompt" in columns and "completion" in columns:
        column = "completion"
        table.require(["prompt", column])
        sources = table.cells("prompt", as_prompt)
        asked = iter(sources)
        answers = table.cells(column, lambda cell: as_answer(next(asked), cell))
        prompts = encode_prompt_column(table, sources, tokenizer, kwargs)
        at = partial(table.at, column=column)
        ends = encode_answers(sources, answers, tokenizer, stop_id, kwargs, at, cut=read_cut(table))
        encoded = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, ends, strict=True)]
    elif "text" in columns:
        column = "text"
        table.require([column])
        texts = encode_texts(tokenizer, table.cells(column, as_text), special=True)
        encoded = [(ids, [True] * len(ids)) for ids in (stopped(text, stop_id) for text in texts)]
    else:
        near = next(filter(None, (did_you_mean(name, columns) for name in ("messages", "completion", "prompt"))), "")
        raise DataError(
            f"{table.path} has the columns {listed(columns)}, none of them to imitate.{near} Write "
            '{"messages": […]}, {"prompt": "…", "completion": "…"} or {"text": "…"}.'
        )
    for i, was_cut in enumerate(read_cut(table)):
        if was_cut:
            ids = without_stop(encoded[i][0], (stop_id,))
            encoded[i] = ids, encoded[i][1][: len(ids)]
    limit = Limit.of_data(config, context)
    examples = []
    torn = 0
    for i in limit.apply(table, column, [len(ids) for ids, _ in encoded]):
        ids, trained = encoded[i]
        ids = keep_right(ids, limit.tokens, tokenizer)
        trained = [True] * len(trained) if train_on == "all" else trained
        cut = len(trained) - len(ids)
        torn += cut > 0 and True in trained[: cut + 1]
        trained = [False, *trained[cut + 1 :]]
        if True not in trained:
            raise table.error(i, column, "holds nothing to learn: no token follows another. Write a text.")
        examples.append(Example(ids, trained, i))
    limit.warn_truncated(table, torn)
    return examples
