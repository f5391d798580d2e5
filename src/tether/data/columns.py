"""Columns of a table to ids; what cannot be encoded is named by its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.chat import encode_answer, encode_prompts, encode_texts
from tether.data.table import Table, kind
from tether.data.text import without_stop
from tether.errors import DataError
from tether.types import Text


def encode_prompt_column(
    table: Table, sources: Sequence[Text], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> list[list[int]]:
    """The ids of each prompt, at least one."""
    try:
        encoded = encode_prompts(tokenizer, sources, kwargs)
    except DataError:  # all at once is fast, one by one tells which
        for i, source in enumerate(sources):
            with table.at(i, "prompt"):
                encode_prompts(tokenizer, [source], kwargs)
        raise
    for i, ids in enumerate(encoded):
        if not ids:
            bos = f", such as {tokenizer.bos_token!r}" if tokenizer.bos_token else ""
            problem = (
                "is empty and the tokenizer adds no token of its own, so the first token of a response would follow"
            )
            raise table.error(i, "prompt", f"{problem} nothing. Write at least one token{bos}.")
    return encoded


def encode_answers(
    prompts: Sequence[Text],
    answers: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int | None,
    kwargs: dict[str, Any] | None,
    at: Callable[[int], AbstractContextManager[None]],
    *,
    cut: Sequence[bool],
) -> list[list[int]]:
    """The ids of each answer, as if they had been sampled after the prompt: with a stop token unless it was cut.

    at: says where, in what is raised about answer i. cut: the answers that ended at a length limit.
    """
    texts = iter(encode_texts(tokenizer, [a for a in answers if isinstance(a, str)], special=False))
    encoded = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if isinstance(prompt, str) or isinstance(answer, str):
            encoded.append(stopped(next(texts), stop_id))
            continue
        with at(i):
            encoded.append(encode_answer(tokenizer, prompt, answer, stop_id=stop_id, kwargs=kwargs))
    return [without_stop(ids, (stop_id,)) if was_cut else ids for ids, was_cut in zip(encoded, cut, strict=True)]


def read_cut(table: Table, column: str = "finish_reason") -> list[bool]:
    """Of each row, whether its answer was cut; rows that do not say so have stopped."""
    for i, row in enumerate(table.rows):
        if row.get(column) not in (None, "stop", "length"):
            raise table.error(
                i, column, f"is {kind(row[column])}: it is unclear whether a stop token follows. Write stop or length."
            )
    return [row.get(column) == "length" for row in table.rows]


def stopped(ids: list[int], stop_id: int | None) -> list[int]:
    return ids if stop_id is None or ids[-1:] == [stop_id] else [*ids, stop_id]
