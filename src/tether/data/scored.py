"""Scored answers for Q-learning: rows of a file, or what another run sampled."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.config import ScoredConfig
from tether.data.cells import as_answer, as_prompt
from tether.data.columns import encode_answers, encode_prompt_column, read_cut
from tether.data.limit import Limit, keep_right
from tether.data.table import Table, kind, read_table
from tether.data.text import fragments
from tether.distributed.ranks import ALONE, Ranks
from tether.errors import DataError
from tether.feedback.records import prompt_of
from tether.runs import Run
from tether.types import Completions, Prompt, Rows

_COLUMNS = ["prompt", "completion", "score"]
_EXAMPLE = '{"prompt": "…", "completion": "…", "score": 0.5}'
_REPLAYED = ["prompt", "prompt_token_id", "token_id", "text", "finish_reason", "score"]


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """An answer and what it is worth, tokenized."""

    prompt: Prompt  # row: the number of the prompt among the different ones
    response_ids: list[int]  # never empty; the stop token included where it stopped
    finish_reason: str  # stop where the last token is a stop token, else length
    score: float


def scored_microbatches(
    answers: Sequence[ScoredResponse], microbatch_tokens: int, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[tuple[Tensor, bool, Rows, Tensor]]:
    """This rank's microbatches: (which answers [B], whether they count, their rows, scores [B]); see `Ranks.deal`."""
    for index, counts in ranks.deal([len(a.prompt.ids) + len(a.response_ids) for a in answers], microbatch_tokens):
        part = [answers[i] for i in index.tolist()]
        rows = Rows.of([a.prompt.ids for a in part], [a.response_ids for a in part]).to(device)
        yield index, counts, rows, torch.tensor([a.score for a in part], device=device)


def load_scored(
    config: ScoredConfig, tokenizer: PreTrainedTokenizerBase, *, stop_id: int | None, context: int | None = None,
    vocab_size: int | None = None,
) -> list[ScoredResponse]:  # fmt: skip
    """Every answer of every path, tokenized; stop_id and context as in `load_examples`.

    vocab_size: rows of the model's embedding, perhaps more than the tokenizer has tokens; None for no limit.

    What a run sampled keeps its token ids: text would not always come back as the same ones.
    """
    limit = Limit.of_data(config, context)
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for path in config.paths:
        if replayed := is_run(path):
            table, prompts, answers = _read_run(path, tokenizer, config.limit, vocab_size)
        else:
            table, prompts, answers = _read_rows(path, config, tokenizer, stop_id)
        scores, cut = _read_scores(table), read_cut(table)
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        for i in limit.apply(table, "completion", lengths):
            if not answers[i]:
                raise table.error(i, "completion", "is empty and no stop token follows: there is nothing to learn.")
            if len(answers[i]) >= limit.tokens:
                raise table.error(
                    i, "completion", f"has {len(answers[i])} tokens, which leaves no room for a prompt in "
                    f"{limit.tokens} ({limit.reason}): of an answer that is cut nothing could be learned. "
                    f"{limit.remedy}, or set data.overlong to drop.",
                )  # fmt: skip
            ids = tuple(keep_right(prompts[i], limit.tokens - len(answers[i]), tokenizer))
            source = table.rows[i]["prompt"]
            prompt = Prompt(ids, source, numbers.setdefault(ids, len(numbers)), cut=len(ids) < len(prompts[i]))
            ended = not cut[i] and (replayed or stop_id is not None)
            found.append(ScoredResponse(prompt, answers[i], "stop" if ended else "length", scores[i]))
    if len({row.score for row in found}) == 1:
        print(f"every answer has the score {found[0].score:g}: none is better than another", file=sys.stderr)
    return found


def all_stop_ids(stop_ids: Sequence[int], answers: Sequence[ScoredResponse]) -> tuple[int, ...]:
    """The model's stop tokens, and after them those that ended answers of runs, ascending: a policy that has learned to
    end with such a token has to stop at it."""
    ended = {a.response_ids[-1] for a in answers if a.finish_reason == "stop"}
    return (*stop_ids, *sorted(ended - set(stop_ids)))


def as_completions(answers: Sequence[ScoredResponse]) -> Completions:
    """Answers of the data as if they had been sampled; with which probability is not known."""
    return Completions(
        prompts=[a.prompt for a in answers],
        response_ids=[a.response_ids for a in answers],
        sampler_logprobs=[[math.nan] * len(a.response_ids) for a in answers],
        truncated_mass=[[math.nan] * len(a.response_ids) for a in answers],
        finish_reasons=[a.finish_reason for a in answers],
    )


def is_run(path: str) -> bool:
    """Whether a path of data is a run directory."""
    return (Path(path) / "config.yaml").is_file()


def _read_rows(
    path: str, config: ScoredConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> tuple[Table, list[list[int]], list[list[int]]]:
    """(rows, ids of each prompt, ids of each answer) of a file."""
    table, kwargs = read_table(path, config.split, config.limit), config.chat_template_kwargs
    table.require(_COLUMNS, _EXAMPLE)
    sources = table.cells("prompt", as_prompt)
    asked = iter(sources)
    answers = table.cells("completion", lambda cell: as_answer(next(asked), cell))
    prompts = encode_prompt_column(table, sources, tokenizer, kwargs)
    at = partial(table.at, column="completion")
    return table, prompts, encode_answers(sources, answers, tokenizer, stop_id, kwargs, at, cut=read_cut(table))


def _read_run(
    path: str, tokenizer: PreTrainedTokenizerBase, limit: int | None, vocab_size: int | None
) -> tuple[Table, list[list[int]], list[list[int]]]:
    """(rows, ids of each prompt, ids of each answer) of what a run sampled, in the order in which it did."""
    run = Run.open(path)
    rows: list[dict[str, Any]] = []
    for cycle in run.rollout_cycles:
        rollouts = run.rollouts(cycle)
        if missing := [name for name in _REPLAYED if name not in rollouts.column_names]:
            raise DataError(
                f"{path} holds rollouts without {', '.join(missing)}, so the ids that were sampled are not known: an "
                "older version wrote them. Sample again with this one."
            )
        rows += rollouts.select(_REPLAYED).to_pylist()
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise DataError(
            f"{path} holds no rollouts, so there is nothing to learn from. Name a run of tether ppo, with "
            "log.rollouts_every above 0."
        )
    rows = rows[:limit]
    table = Table(path, [row | {"prompt": prompt_of(row["prompt"])} for row in rows])
    _check_tokens(table, tokenizer, vocab_size)
    return table, [row["prompt_token_id"] for row in rows], [row["token_id"] for row in rows]


_PROBED = 256  # answers


def _check_tokens(table: Table, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raise DataError unless the ids of a run's answers are, to this tokenizer, the texts that the run wrote down.

    Told by the answers themselves: they need no other file of the run, and what reads the same *is* the same here.
    """
    for i, row in enumerate(table.rows):
        ids = row["token_id"]
        known = vocab_size is None or max([*ids, *row["prompt_token_id"]]) < vocab_size
        # the last token was a stop token of the run, whose text is "", or it was not
        if not known or (i < _PROBED and row["text"] not in (fragments(tokenizer, ids, s) for s in (ids[-1:], ()))):
            said = repr("".join(fragments(tokenizer, ids, ids[-1:])))[:60] if known else "no such ids"
            raise table.error(
                i, "token_id", f"was sampled with another tokenizer: the run read it as {''.join(row['text'])[:60]!r}, "
                f"model.policy's tokenizer reads {said}. Name a model.policy with the run's tokenizer, or write its "
                "answers to a file as prompt, completion, score.",
            )  # fmt: skip


def _read_scores(table: Table) -> list[float]:
    """The score of each row."""
    scores = []
    for i, row in enumerate(table.rows):
        value = row["score"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise table.error(
                i, "score", f"is {kind(value)}, where every answer needs a number to be learned from. Score it, or "
                "remove the row.",
            )  # fmt: skip
        scores.append(float(value))
    return scores
