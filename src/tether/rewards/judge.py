"""Scores from a judge: `reward: [{judge: judge.yaml, form: pointwise}]`, a model that is asked about every answer.

    pointwise   Σ i·p(i): the rating from 1 to 10 that the judge expects of each answer (`tether.feedback.rating`)
    pairwise    (1/g)·Σ_j logit P(answer i is better than answer j) over the g answers to its prompt, 0 for j = i

Pairwise scores of one prompt add up to 0. Of a judge whose logits are the differences of a reward (Bradley–Terry) they
are that reward less the group's mean: two answers differ by the log-odds that one is better, the unit that reward
models score in, so that β means the same. The mean of probabilities would not be linear in the reward.

What no answer could be read from has no score: None, or the end of the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.config import JudgeConfig
from tether.config.reading import load_judge
from tether.data.text import completion_text
from tether.errors import RewardError, TetherError
from tether.feedback.client import check_key
from tether.feedback.constitution import draw_principle, read_constitution
from tether.feedback.endpoint import Endpoint
from tether.feedback.judge_cache import JudgeCache, cache_path
from tether.feedback.local_judge import LocalJudge
from tether.feedback.queue import display_order
from tether.feedback.rating import Rated, Rating
from tether.feedback.records import Verdict
from tether.feedback.verdict import Comparison, NoVerdict
from tether.remote import Cancelled
from tether.rewards.function import describe_row, refuse_cut
from tether.runs.files import hash_files
from tether.types import Completions, Prompt, Text

Question = Rating | Comparison
_KINDS: dict[str, type[Question]] = {"pointwise": Rating, "pairwise": Comparison}
_BOTH = ((0, 1), (1, 0))


class JudgeReward:
    """A judge as a source of scores. An endpoint's answers are kept in a file: what was paid is not paid again."""

    def __init__(
        self,
        path: str,
        *,
        name: str,
        form: str,
        optional: bool,
        kept: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
    ) -> None:
        """path: the judge's file. form: pointwise or pairwise. optional: no score where none could be read; else that
        is an error.

        kept: the file that keeps the answers of a run's sources, beside which an endpoint's are kept; None: they are
        kept beside the judge's file. tokenizer, stop_ids: the policy's.
        """
        self.name, self.form, self._optional = name, form, optional
        self.config = load_judge(path)
        self.principles = read_constitution(self.config.judge.constitution, f"{path}: judge.constitution")
        self._cache = cache_path(str(kept or Path(path).with_suffix(".db")), f"judge:{name}")
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._stop = threading.Event()
        self.local = LocalJudge(self.config, _KINDS[form].symbols) if self.config.judge.base_url is None else None
        if self.local is None:
            check_key(self.config.judge, f"{path}: judge")

    @property
    def remote(self) -> bool:
        """Whether it is on another machine: see `tether.rewards.combine.RewardSet`."""
        return self.local is None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError where the judge could not be shown what the policy saw of a prompt."""
        refuse_cut(prompts, self.name)

    def score(self, completions: Completions) -> list[float | None]:
        """B scores; pairwise the answers to one prompt stand together."""
        answers = [completion_text(self._tokenizer, ids, self._stop_ids) for ids in completions.response_ids]
        sources = [prompt.source for prompt in completions.prompts]
        scores, failed = (self._rate if self.form == "pointwise" else self._compare)(sources, answers, completions)
        if failed and not self._optional:
            row = min(failed)
            said = f", as in {failed[row].reply[:80]!r}" if failed[row].reply else ""
            raise RewardError(
                f"reward {self.name}: {self.config.judge.model} gave no answer about {describe_row(completions, row)} "
                f"that could be read ({failed[row].reason}{said}), and about {len(failed) - 1} more of "
                f"{len(completions)}: they have no scores. Use a model that can follow instructions, or one that was "
                "trained to answer so; or set `optional: true` of this source if nothing is what it should add there."
            )
        return scores

    def cancel(self) -> None:
        """End a `score` that is waiting in another thread; what is in flight is waited for there, and kept."""
        self._stop.set()

    # ------------------------------------------------------------ the two forms

    def _rate(
        self, sources: list[Text], answers: list[str], completions: Completions
    ) -> tuple[list[float | None], dict[int, NoVerdict]]:
        """(B ratings; what was said instead, by row). The same answer to the same prompt is rated once."""
        keys = [(mark(source), answer) for source, answer in zip(sources, answers, strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        found = self._ask(
            [Rating(row, sources[row], answers[row], self._principle(sources[row])) for row in sorted(first.values())],
            completions,
        )
        outcomes = [found[first[key]] for key in keys]
        failed = {row: outcome for row, outcome in enumerate(outcomes) if isinstance(outcome, NoVerdict)}
        return [outcome.rating if isinstance(outcome, Rated) else None for outcome in outcomes], failed

    def _compare(
        self, sources: list[Text], answers: list[str], completions: Completions
    ) -> tuple[list[float | None], dict[int, NoVerdict]]:
        """(B scores; what was said instead, by row). A pair of equal answers is not asked about: neither is better."""
        groups = [[row for row, _ in rows] for _, rows in groupby(enumerate(map(mark, sources)), key=lambda x: x[1])]
        if any(len(rows) < 2 for rows in groups):
            raise RewardError(
                f"reward {self.name} compares the answers to a prompt with each other, and "
                f"{describe_row(completions, next(rows[0] for rows in groups if len(rows) < 2))} has only one. Sample "
                "2 or more answers to each prompt, or set form: pointwise of this source."
            )
        asked: dict[tuple[str, str, str], Comparison] = {}
        for rows in groups:
            for a, b in combinations(sorted({answers[row] for row in rows}), 2):
                asked.setdefault((mark(sources[rows[0]]), a, b), self._pair(len(asked), sources[rows[0]], a, b))
        found = self._ask(list(asked.values()), completions)
        scores: list[float | None] = []
        failed: dict[int, NoVerdict] = {}
        for rows in groups:
            for row in rows:
                logits = []
                for other in rows:
                    a, b = sorted((answers[row], answers[other]))
                    if a == b:
                        continue
                    outcome = found[asked[mark(sources[row]), a, b].item]
                    if isinstance(outcome, Verdict):
                        q = math.log(outcome.probability / (1 - outcome.probability))  # P is within [.01, .99]
                        logits.append(q if answers[row] == a else -q)
                    elif isinstance(outcome, NoVerdict):
                        failed[row] = outcome
                scores.append(None if row in failed else math.fsum(logits) / len(rows))
        return scores, failed

    def _pair(self, item: int, source: Text, a: str, b: str) -> Comparison:
        orders: tuple[tuple[int, ...], ...] = _BOTH
        if self.config.judge.orders == "one":
            orders = (display_order(self.config.seed, f"{mark(source)} {mark([a, b])}", "", 2),)
        return Comparison(item, source, (a, b), self._principle(source), orders)

    def _principle(self, source: Text) -> str:
        """One for all answers to a prompt, in every cycle: they are compared with each other."""
        return draw_principle(self.principles, seed=self.config.seed, item=mark(source))

    # ------------------------------------------------------------ asking

    def _ask(self, questions: Sequence[Question], completions: Completions) -> dict[int, Rated | Verdict | NoVerdict]:
        """What the judge says, by the questions' numbers; all of them are answered, if in no form that can be read."""
        found: dict[int, Rated | Verdict | NoVerdict] = {}
        try:
            with self._asker() as judge:
                outcomes: Any = judge.compare(questions)
                try:
                    for outcome in outcomes:
                        if self._stop.is_set():
                            raise Cancelled
                        if outcome is not None:
                            found[outcome.item] = outcome
                finally:
                    outcomes.close()
                cost = judge.cost()
        except RewardError:
            raise
        except TetherError as error:
            raise RewardError(f"reward {self.name}: {error}") from error
        if gone := [x for x in found.values() if isinstance(x, NoVerdict) and x.gone]:
            raise RewardError(
                f"reward {self.name}: {self.config.judge.base_url} did not answer {len(gone)} of {len(questions)} "
                f"questions ({gone[0].reply}), so {len(completions)} responses, from {describe_row(completions, 0)} "
                "on, have no scores. What it did answer is kept: see whether it runs, or raise limits.retries of the "
                "judge's file, and run the same command again."
            )
        if len(found) < len(questions):
            raise RewardError(
                f"reward {self.name}: {cost}, and {len(questions) - len(found)} of {len(questions)} questions about "
                f"{len(completions)} responses were not asked: a limit is reached. What was answered is kept: raise "
                "limits in the judge's file, and run the same command again."
            )
        return found

    @contextmanager
    def _asker(self) -> Iterator[Endpoint | LocalJudge]:
        if self.local is not None:
            yield self.local
            return
        # A score that was cancelled a moment ago may still hold the file, until what is in flight is answered.
        cache = JudgeCache(self._cache, wait_s=self.config.limits.timeout_s)
        try:
            yield Endpoint(self.config.judge, self.config.limits, cache)
        finally:
            cache.close()


def mark(value: Text | list[str]) -> str:
    """Equal for equal prompts, and for equal lists of texts."""
    return json.dumps(value, sort_keys=True)


def longest_question(path: str, form: str, prompts: Sequence[Prompt]) -> tuple[LocalJudge, int] | None:
    """(the judge, tokens of the longest question about an empty answer) of a local judge; None of an endpoint."""
    config = load_judge(path)
    if config.judge.base_url is not None:
        return None
    local = LocalJudge(config, _KINDS[form].symbols)
    principle = max(read_constitution(config.judge.constitution), key=len)
    longest = sorted(prompts, key=lambda prompt: len(prompt.ids))[-_LOOKED_AT:]
    asked: list[Question] = [
        Rating(0, p.source, "", principle)
        if form == "pointwise"
        else Comparison(0, p.source, ("", ""), principle, _BOTH)
        for p in longest
    ]
    return local, max(len(local.encode(question, question.orders[0])) for question in asked)


_LOOKED_AT = 64  # prompts, the longest in the policy's tokens


def judge_hash(path: str) -> str:
    """Of what a judge's scores depend on: equal where they are the same. Where an endpoint is, and what it may be asked
    for, may change while a run goes on."""
    config = load_judge(path)
    j = config.judge
    model = j.model if j.base_url is not None else hash_files(j.model)
    parts = [model, read_constitution(j.constitution), j.orders, j.votes, j.answer, config.seed]
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def describe_judge(config: JudgeConfig, form: str) -> str:
    """`judge NAME at URL, pointwise`"""
    j = config.judge
    return f"judge {j.model}{f' at {j.base_url}' if j.base_url is not None else ', in this process'}, {form}"
