"""Preferences for reward models: pairs of completions, one of them chosen."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from tether.config import PairsConfig
from tether.data.cells import as_answer, as_prompt, as_text_or_messages
from tether.data.columns import encode_answers, encode_prompt_column, read_cut
from tether.data.limit import Limit, keep_right
from tether.data.snapshot import read_pairs
from tether.data.table import Table, kind
from tether.data.text import common_prefix
from tether.errors import DataError
from tether.types import Text

ASSISTANT = "\n\nAssistant:"  # how HH-RLHF transcripts open the assistant's turns


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, tokenized: the chosen one was preferred."""

    prompt_ids: list[int]  # never empty; shared by both
    chosen_ids: list[int]  # the stop token included
    rejected_ids: list[int]
    row: int  # its row in the data set, from 0
    prompt_key: str  # equal for pairs with the same prompt, as it was before anything was cut
    group: str | None = None  # the data set's own word for pairs that belong together
    probability: float = 1.0  # that the chosen one is preferred; 0.5 is a tie
    weight: float = 1.0  # in the loss; above 0

    @property
    def answers(self) -> tuple[list[int], ...]:
        return self.chosen_ids, self.rejected_ids


def load_pairs(
    config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, stop_id: int | None, context: int | None = None,
    pinned: str | None = None, table: Table | None = None,
) -> list[Pair]:  # fmt: skip
    """Every preference of a data set, tokenized; stop_id and context as in `load_examples`.

    pinned: which state of a store of labels to read (`pin_labels`); None is the present one.
    table: what `read_pairs` gave, where it was read already.
    """
    table = table or read_pairs(config, pinned)
    table.require(["chosen", "rejected"], '{"prompt": "…", "chosen": "…", "rejected": "…"}')
    triples = [triple(table, i) for i in range(len(table))]
    prompts, chosen, rejected = (list(column) for column in zip(*triples, strict=True))
    kwargs = config.chat_template_kwargs
    prompt_ids = encode_prompt_column(table, prompts, tokenizer, kwargs)

    def encode(column: str, answers: list[Text]) -> list[list[int]]:
        at, was_cut = partial(table.at, column=column), read_cut(table, f"{column}_finish_reason")
        return encode_answers(prompts, answers, tokenizer, stop_id, kwargs, at, cut=was_cut)

    chosen_ids, rejected_ids = encode("chosen", chosen), encode("rejected", rejected)
    probability = _read_numbers(table, "probability", lambda p: 0 <= p <= 1, "a probability: write 0.5 for a tie")
    weight = read_weights(table)
    limit = Limit.of_data(config, context)
    answer_lengths = [max(len(c), len(r)) for c, r in zip(chosen_ids, rejected_ids, strict=True)]
    pairs = []
    torn = alike = 0
    for i in limit.apply(table, "chosen", [len(p) + n for p, n in zip(prompt_ids, answer_lengths, strict=True)]):
        if chosen_ids[i] == rejected_ids[i]:
            raise table.error(
                i, "rejected", "has the same tokens as chosen, so there is nothing to prefer. Remove the row."
            )
        prompt = keep_right(prompt_ids[i], max(1, limit.tokens - answer_lengths[i]), tokenizer)
        room = limit.tokens - len(prompt)  # an answer that is too long by itself loses its beginning as well
        torn += answer_lengths[i] > room
        if chosen_ids[i][-room:] == rejected_ids[i][-room:]:
            alike += 1
            continue
        group = table.rows[i].get("group")
        pairs.append(
            Pair(
                prompt_ids=prompt,
                chosen_ids=chosen_ids[i][-room:],
                rejected_ids=rejected_ids[i][-room:],
                row=i,
                prompt_key=prompt_key(prompts[i]),
                group=None if group is None else str(group),
                probability=probability[i],
                weight=weight[i],
            )
        )
    limit.warn_truncated(table, torn)
    limit.drop_identical(table, alike, left=len(pairs))
    return pairs


def prompt_key(prompt: Text) -> str:
    """Equal for equal prompts alone."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:32]


def read_weights(table: Table) -> list[float]:
    """The weight of each row in the loss, 1 where it has none."""
    return _read_numbers(table, "weight", lambda w: 0 < w < math.inf, "a weight in the loss: write a number above 0")


def _read_numbers(table: Table, column: str, fits: Callable[[float], bool], wanted: str) -> list[float]:
    """A number of each row, 1 where it has none."""
    numbers = []
    for i, row in enumerate(table.rows):
        value = row.get(column)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not fits(value)):
            raise table.error(i, column, f"is {kind(value)}, which is not {wanted}, or leave the column out.")
        numbers.append(1.0 if value is None else float(value))
    return numbers


def triple(table: Table, row: int) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row; without a prompt, or with whole conversations, from what the two share."""
    cells = table.rows[row]
    with table.at(row, "chosen"):
        chosen = as_text_or_messages(cells["chosen"])
    with table.at(row, "rejected"):
        rejected = as_text_or_messages(cells["rejected"])
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise DataError(f"is {kind(rejected)}, but chosen is {kind(chosen)}. Write both in the same form.")
        if chosen == rejected:
            raise DataError("equals chosen, so there is nothing to prefer. Remove the row.")
    prompt = cells.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        with table.at(row, "chosen"):
            return split_transcripts(chosen, rejected)
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        if chosen[0]["role"] != "assistant":
            shared = common_prefix(chosen, rejected)
            if not shared:
                raise table.error(
                    row,
                    "rejected",
                    "shares no message with chosen, so there is no prompt. Begin both with the same messages, or write "
                    "a column 'prompt' and only the assistant's answers here.",
                )
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    with table.at(row, "prompt"):
        prompt = as_prompt(prompt)
    with table.at(row, "chosen"):
        chosen = as_answer(prompt, chosen)
    with table.at(row, "rejected"):
        rejected = as_answer(prompt, rejected)
    return prompt, chosen, rejected


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole transcripts: they part after the last Assistant: that they share.

    >>> split_transcripts("\\n\\nHuman: Hi\\n\\nAssistant: Hello", "\\n\\nHuman: Hi\\n\\nAssistant: Go away")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Hello', ' Go away')
    """
    common = chosen[: common_prefix(chosen, rejected)]
    start = common.rfind(ASSISTANT)
    if start < 0:
        raise DataError(
            f"chosen and rejected share only {common[:60]!r}, without {ASSISTANT!r}, so the prompt cannot be told from "
            "the answers. Add a column 'prompt', or begin both with the same transcript up to the assistant's turn."
        )
    border = start + len(ASSISTANT)
    return chosen[:border], chosen[border:], rejected[border:]
