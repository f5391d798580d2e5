"""Single answers, each labeled good or bad: what people give who rate instead of comparing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from tether.config import PairsConfig
from tether.data.cells import as_answer, as_prompt
from tether.data.columns import encode_answers, encode_prompt_column, read_cut
from tether.data.limit import Limit, keep_right
from tether.data.pairs import Pair, load_pairs, prompt_key, read_weights
from tether.data.snapshot import read_pairs
from tether.data.table import Table, kind
from tether.errors import DataError


@dataclass(frozen=True, slots=True)
class Labeled:
    """A completion of a prompt, tokenized, and what was said of it."""

    prompt_ids: list[int]  # never empty
    answer_ids: list[int]  # the stop token included
    row: int  # its row in the data set, from 0
    prompt_key: str  # equal for answers to the same prompt, as it was before anything was cut
    group: str | None = None  # the data set's own word for answers that belong together
    probability: float = 1.0  # that it is good
    weight: float = 1.0  # in the loss; above 0

    @property
    def answers(self) -> tuple[list[int], ...]:
        return (self.answer_ids,)


Preference = Pair | Labeled


def load_pairs_or_labeled(
    config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, stop_id: int | None, context: int | None = None,
    pinned: str | None = None, pairs_for: str | None = None,
) -> list[Pair] | list[Labeled]:  # fmt: skip
    """Rows with prompt, completion and label where data.path holds such, else pairs; arguments as of `load_pairs`.

    pairs_for: the loss that compares two answers; DataError where labeled ones are there instead. None: either will do.
    """
    table = read_pairs(config, pinned)
    first = table.rows[0]
    single = "chosen" not in first
    if single and "label" in first and pairs_for is None:
        return _labeled(table, config, tokenizer, stop_id, context)
    if single and "completion" in first:
        _refuse_single(table, pairs_for)
    return load_pairs(config, tokenizer, stop_id=stop_id, context=context, table=table)


def _refuse_single(table: Table, pairs_for: str | None) -> None:
    """Raise DataError for single answers that the loss cannot read; returns where they have neither label nor score."""
    labels, scores = ("label" in table.rows[0]), ("score" in table.rows[0])
    if not labels and not scores:
        return
    wanted = f"dpo.loss={pairs_for} compares two answers" if pairs_for else "the loss reads labels or pairs"
    remedies = ["set dpo.loss to unpaired or kto"] * labels + ["learn from their scores with tether qlearning"] * scores
    told = " or ".join(remedies)
    raise DataError(
        f"{table.place(0)}: these are {'labeled' if labels else 'scored'} answers, one a row, and {wanted}: there is "
        f"nothing that it could learn from. {told[:1].upper()}{told[1:]}."
    )


def split_pair(pair: Pair) -> tuple[Labeled, Labeled]:
    """A pair as two labels: the chosen answer is good as surely as it was preferred, the rejected one bad."""
    return (
        Labeled(pair.prompt_ids, pair.chosen_ids, pair.row, pair.prompt_key, pair.group, pair.probability, pair.weight),
        Labeled(pair.prompt_ids, pair.rejected_ids, pair.row, pair.prompt_key, pair.group, 1 - pair.probability,
                pair.weight),
    )  # fmt: skip


def preferred_first(pair: Preference) -> Preference:
    """The same preference with the likelier winner as the chosen one."""
    if isinstance(pair, Labeled) or pair.probability >= 0.5:
        return pair
    likelier = 1 - pair.probability
    return replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids, probability=likelier)


def singles(examples: Sequence[Preference]) -> list[Preference]:
    """Labeled answers, two out of every pair."""
    return [single for x in examples for single in (split_pair(x) if isinstance(x, Pair) else (x,))]


def as_pairs(examples: Sequence[Preference]) -> list[Pair]:
    """Pairs as they are; of labeled answers a good one with a bad one, see `pair_labels`."""
    if examples and isinstance(examples[0], Pair):
        return [x for x in examples if isinstance(x, Pair)]
    singles = [x for x in examples if isinstance(x, Labeled)]
    good, bad = pair_labels(singles)
    return [
        Pair(singles[i].prompt_ids, singles[i].answer_ids, singles[j].answer_ids, singles[i].row,
             singles[i].prompt_key, singles[i].group)
        for i, j in zip(good, bad, strict=True)
    ]  # fmt: skip


def pair_labels(examples: Sequence[Labeled]) -> tuple[list[int], list[int]]:
    """Positions of good answers, and of a bad one for each: to the same prompt where any prompt has both.

    Of a prompt with g good and b bad answers, max(g, b) pairs: every answer is in one, those of the rarer side in more.
    """
    of_prompt: dict[str, tuple[list[int], list[int]]] = {}
    for i, x in enumerate(examples):
        if x.probability != 0.5:
            of_prompt.setdefault(x.prompt_key, ([], []))[x.probability < 0.5].append(i)
    groups = [(good, bad) for good, bad in of_prompt.values() if good and bad]
    if not groups:
        sides = zip(*of_prompt.values(), strict=True) if of_prompt else ([], [])
        good, bad = (sorted(i for part in side for i in part) for side in sides)
        groups = [(good, bad)] if good and bad else []
    found = [(g[k % len(g)], b[k % len(b)]) for g, b in groups for k in range(max(len(g), len(b)))]
    return [i for i, _ in found], [j for _, j in found]


def _labeled(
    table: Table, config: PairsConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None, context: int | None
) -> list[Labeled]:
    table.require(["prompt", "completion", "label"], '{"prompt": "…", "completion": "…", "label": true}')
    prompts = table.cells("prompt", as_prompt)
    asked = iter(prompts)
    answers = table.cells("completion", lambda cell: as_answer(next(asked), cell))
    prompt_ids = encode_prompt_column(table, prompts, tokenizer, config.chat_template_kwargs)
    at = partial(table.at, column="completion")
    answer_ids = encode_answers(
        prompts, answers, tokenizer, stop_id, config.chat_template_kwargs, at, cut=read_cut(table)
    )
    probability, weight = _read_labels(table), read_weights(table)
    limit, found, torn = Limit.of_data(config, context), [], 0
    for i in limit.apply(table, "completion", [len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)]):
        if not answer_ids[i]:
            raise table.error(i, "completion", "has no token, so there is nothing to label. Write a text.")
        prompt = keep_right(prompt_ids[i], max(1, limit.tokens - len(answer_ids[i])), tokenizer)
        room = limit.tokens - len(prompt)
        torn += len(answer_ids[i]) > room
        group = table.rows[i].get("group")
        found.append(Labeled(
            prompt, answer_ids[i][-room:], i, prompt_key(prompts[i]), None if group is None else str(group),
            probability[i], weight[i],
        ))  # fmt: skip
    limit.warn_truncated(table, torn)
    return found


def _read_labels(table: Table) -> list[float]:
    """P(good) of each row: true is 1, false is 0, a number in [0, 1] itself."""
    labels = []
    for i, row in enumerate(table.rows):
        value = row["label"]
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise table.error(
                i, "label", f"is {kind(value)}, which is not a label: write true or false, or the probability that "
                "the completion is good.",
            )  # fmt: skip
        labels.append(float(value))
    return labels
