"""Examples for supervised training: what to imitate, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from tether.config import DataConfig
from tether.data.cells import as_answer, as_messages, as_prompt, as_text
from tether.data.chat import encode_conversations, encode_texts
from tether.data.columns import encode_answers, encode_prompt_column, read_cut, stopped, without_stop
from tether.data.limit import Limit, keep_right
from tether.data.table import Table, listed, read_table
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

    stop_id: appended to what is learned, and learned, where it does not stand there yet; None leaves it off. An example
    whose `finish_reason` is length was cut, and ends without it.
    train_on: completion, or all for every token.
    context: tokens that the model has positions for, None for no limit.
    """
    table = read_table(config.path, config.split, config.limit)
    columns = table.rows[0]
    if "messages" in columns:
        column, encoded = "messages", _encode_conversations(table, config, tokenizer, stop_id)
    elif "prompt" in columns and "completion" in columns:
        column, encoded = "completion", _encode_prompt_completion(table, config, tokenizer, stop_id)
    elif "text" in columns:
        column, encoded = "text", _encode_whole_texts(table, tokenizer, stop_id)
    else:
        near = (
            did_you_mean("messages", columns) or did_you_mean("completion", columns) or did_you_mean("prompt", columns)
        )
        raise DataError(
            f"{table.path} has the columns {listed(columns)}, none of them to imitate.{near} Write "
            '{"messages": […]}, {"prompt": "…", "completion": "…"} or {"text": "…"}.'
        )
    for i, was_cut in enumerate(read_cut(table)):
        if was_cut:
            ids = without_stop(encoded[i][0], stop_id)
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


Encoded = list[tuple[list[int], list[bool]]]  # ids and trained, of every row


def _encode_conversations(
    table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> Encoded:
    table.require(
        ["messages"], '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    )
    conversations = []
    for i, row in enumerate(table.rows):
        with table.at(i, "messages"):
            conversations.append(as_messages(row["messages"]))
    at = partial(table.at, column="messages")
    return encode_conversations(tokenizer, conversations, at, stop_id=stop_id, kwargs=config.chat_template_kwargs)


def _encode_prompt_completion(
    table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> Encoded:
    table.require(["prompt", "completion"], '{"prompt": "…", "completion": "…"}')
    prompts, completions = [], []
    for i, row in enumerate(table.rows):
        with table.at(i, "prompt"):
            prompts.append(as_prompt(row["prompt"]))
        with table.at(i, "completion"):
            completions.append(as_answer(prompts[i], row["completion"]))
    prompt_ids = encode_prompt_column(table, prompts, tokenizer, config.chat_template_kwargs)
    at = partial(table.at, column="completion")
    answers = encode_answers(
        prompts, completions, tokenizer, stop_id, config.chat_template_kwargs, at, cut=read_cut(table)
    )
    return [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompt_ids, answers, strict=True)]


def _encode_whole_texts(table: Table, tokenizer: PreTrainedTokenizerBase, stop_id: int | None) -> Encoded:
    table.require(["text"], '{"text": "…"}')
    texts = []
    for i, row in enumerate(table.rows):
        with table.at(i, "text"):
            texts.append(as_text(row["text"]))
    encoded = [stopped(ids, stop_id) for ids in encode_texts(tokenizer, texts, special=True)]
    return [(ids, [True] * len(ids)) for ids in encoded]
